"""The examples of FastAPI tutorials on background tasks, each as a courtesy or as a promise."""

from collections.abc import Callable
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, BackgroundTasks, Path, Query, Request

from afterward.fastapi import DurableTasks
from app.api.dependencies import ClientDep, LogFileDep, QueueDep, check_recipient
from app.api.errors import documented
from app.api.route import ServiceRoute
from app.api.schemas import Accepted, Address, JsonObject, Name, Queued, QueuedItem
from app.tasks.courtesies import process_data, write_log
from app.tasks.data import COLLECTION, save_data
from app.tasks.mail import send_email

router = APIRouter(tags=["tutorial"], route_class=ServiceRoute)

RouteT = TypeVar("RouteT", bound=Callable[..., Any])


def post(path: str, *errors: int) -> Callable[[RouteT], RouteT]:
    """Decorate a POST route: it exists with and without a trailing slash, without a redirect."""

    def add(route: RouteT) -> RouteT:
        router.post(path, status_code=202, responses=documented(*errors))(route)
        other = path.removesuffix("/") if path.endswith("/") else path + "/"
        router.post(other, status_code=202, include_in_schema=False)(route)
        return route

    return add


@post("/send-email/", 409, 413, 422, 503, 507)
async def send_simple_email(
    email: Address, request: Request, durable_tasks: DurableTasks
) -> Queued:
    """Queue a mail, the simplest background task."""
    check_recipient(request, email)
    task = durable_tasks.add_task(
        send_email,
        recipient=email,
        subject="Hello",
        message="This mail was sent in the background.",
    )
    return Queued.of(task, "Email queued")


@post("/save-data/", 409, 413, 415, 422, 503, 507)
async def save_user_data(
    user_id: Annotated[Name, Query()], data: JsonObject, durable_tasks: DurableTasks
) -> Queued:
    """Queue a task with arguments: it saves the object that the client has sent."""
    task = durable_tasks.add_task(save_data, user_id=user_id, data=data)
    return Queued.of(task, "Data queued to be saved")


@router.get("/save-data/{user_id}", responses=documented(404, 422, 503))
async def read_user_data(user_id: Name, queue: QueueDep, client: ClientDep) -> JsonObject:
    """Return the object that was last saved for this user."""
    record = await queue.engine.read_record(COLLECTION, user_id, client=client)
    return record.body


@post("/multiple-tasks/", 409, 413, 422, 503, 507)
async def run_multiple_tasks(background_tasks: BackgroundTasks, log_file: LogFileDep) -> Accepted:
    """Add three background tasks, which run in order. The second fails, the third still runs."""
    background_tasks.add_task(write_log, log_file, "first task")
    background_tasks.add_task(process_data, {"error": "the task between the two"})
    background_tasks.add_task(write_log, log_file, "second task")
    return Accepted(message="Tasks queued")


@post("/process/", 409, 413, 415, 422, 503, 507)
async def process(data: JsonObject, background_tasks: BackgroundTasks) -> Accepted:
    """Add a background task that may raise. The error is logged, and the client gets its 202."""
    background_tasks.add_task(process_data, data)
    return Accepted(message="Processing queued")


@post("/items/{item_id}", 409, 413, 422, 503, 507)
async def create_item(
    item_id: Annotated[int, Path(ge=0, le=2**63 - 1)],
    request: Request,
    durable_tasks: DurableTasks,
    email: Address = "customer@example.com",
) -> QueuedItem:
    """Create an item, and queue a mail that confirms it."""
    check_recipient(request, email)
    task = durable_tasks.add_task(
        send_email,
        recipient=email,
        subject=f"Item {item_id} created",
        message=f"Your item {item_id} was created.",
    )
    return QueuedItem.of(task, "Confirmation queued", item_id=item_id)


@post("/test-task/", 409, 413, 422, 503, 507)
async def run_test_task(background_tasks: BackgroundTasks, log_file: LogFileDep) -> Accepted:
    """Add a background task for a test. TestClient waits for it, but a real client does not."""
    background_tasks.add_task(write_log, log_file, "test task")
    return Accepted(message="Test task queued")
