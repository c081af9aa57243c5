"""Durable tasks in a FastAPI app of ten lines: committed before the 202, and run after it."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import pytest
from fastapi import (
    APIRouter,
    BackgroundTasks,
    Depends,
    FastAPI,
    Form,
    HTTPException,
    Query,
    Request,
    Response,
)
from fastapi.responses import PlainTextResponse, StreamingResponse
from fastapi.testclient import TestClient
from pydantic import BaseModel
from starlette.types import Message, Receive, Scope, Send

from afterward import Afterward, Context, QueueError, QueueUnavailable, Status, Task, retention
from afterward.errors import CannotStart, CommitUnknown, TaskNotFound
from afterward.fastapi import DurableRoute, DurableTasks
from afterward.filter import TaskFilter

WITHIN_SECONDS = 10.0

router = APIRouter(route_class=DurableRoute)


async def send_email(context: Context[Any], recipient: str) -> str:
    """Hand a mail to the mailer, which is a list here."""
    context.tools.append(recipient)
    return recipient


class Letter(BaseModel):
    """The body of a request, and the argument of its task."""

    recipient: str
    written_at: datetime


async def send_letter(context: Context[Any], letter: Letter) -> Letter:
    """Return the letter."""
    context.tools.append(letter)
    return letter


async def wait_forever(context: Context[Any]) -> None:
    """Run until the worker stops."""
    context.tools.append("running")
    await asyncio.Event().wait()


@router.post("/orders", status_code=202)
async def order(recipient: str, durable_tasks: DurableTasks) -> str:
    return durable_tasks.add_task(send_email, recipient).id


@router.post("/letters", status_code=202)
async def letter(letter: Letter, durable_tasks: DurableTasks) -> str:
    return durable_tasks.add_task(send_letter, letter).id


@router.post("/newsletters", status_code=202)
async def newsletter(
    recipients: Annotated[list[str], Query()], durable_tasks: DurableTasks
) -> list[str]:
    durable_tasks.as_batch()
    return [durable_tasks.add_task(send_email, recipient).id for recipient in recipients]


@router.post("/nothing", status_code=202)
async def nothing(durable_tasks: DurableTasks) -> None:
    """Add no task."""


@router.get("/reads", status_code=202)
async def read() -> None:
    """Add no task, and answer as if there were one."""


@router.post("/in-passing")
async def in_passing(durable_tasks: DurableTasks) -> str:
    """Add a task, and answer 200: the client did not ask for it."""
    return durable_tasks.add_task(send_email, "ada@example.com").id


@router.post("/changes-its-mind", status_code=202)
async def changes_its_mind(durable_tasks: DurableTasks) -> None:
    task = durable_tasks.add_task(send_email, "ada@example.com")
    raise HTTPException(404, task.id)


@router.post("/retries/{task_id}", status_code=202)
async def retry(
    task_id: str, request: Request, durable_tasks: DurableTasks, *, and_more: bool = False
) -> None:
    durable_tasks.retry_task(await request.state.queue.get(task_id))
    if and_more:
        durable_tasks.add_task(send_email, "ada@example.com")


@router.post("/waits", status_code=202)
async def wait(durable_tasks: DurableTasks) -> str:
    return durable_tasks.add_task(wait_forever).id


@router.post("/form", status_code=202)
async def form(recipient: Annotated[str, Form()], durable_tasks: DurableTasks) -> str:
    return durable_tasks.add_task(send_email, recipient).id


@router.post("/stream", status_code=202)
async def stream(durable_tasks: DurableTasks) -> StreamingResponse:
    durable_tasks.add_task(send_email, "ada@example.com")
    return StreamingResponse(iter(["sent"]), 202)


@router.post("/too-late", status_code=202)
async def too_late(background_tasks: BackgroundTasks, durable_tasks: DurableTasks) -> None:
    background_tasks.add_task(durable_tasks.add_task, send_email, "ada@example.com")


@router.post("/orders/17", status_code=202)
async def order_17(response: Response, durable_tasks: DurableTasks) -> None:
    durable_tasks.add_task(send_email, "ada@example.com")
    response.headers["Location"] = "/orders/17"


class Service:
    """An app, the library in it, and the mails that were sent."""

    def __init__(self, directory: Path, **settings: Any) -> None:
        self.sent: list[Any] = []
        self.afterward = Afterward(
            f"sqlite:///{directory}/queue.db",
            tasks=[send_email, send_letter, wait_forever],
            tools=self.sent,
            **settings,
        )
        self.app = FastAPI(lifespan=self.afterward.lifespan)
        self.app.include_router(router)

    def read(self, client: TestClient, task_id: str) -> Task:
        """Read a task in the app's own event loop."""
        assert client.portal is not None
        return client.portal.call(self.afterward.queue.engine.get, task_id)


@pytest.fixture
def idle(tmp_path: Path) -> Service:
    """A service without a worker, so that tasks stay as they were committed."""
    return Service(tmp_path, concurrency=0)


@pytest.fixture
def client(idle: Service) -> Iterator[TestClient]:
    with TestClient(idle.app) as client:
        yield client


def count(service: Service, client: TestClient) -> int:
    assert client.portal is not None
    backlog = client.portal.call(service.afterward.queue.engine.backlog)
    return sum(backlog.counts.values())


def until(condition: Any) -> None:
    deadline = time.monotonic() + WITHIN_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


# Commit, then 202


def test_a_task_is_committed_before_the_202(idle: Service) -> None:
    """When the first byte of the response is sent, the task can be read from the database."""
    stored: list[Task] = []

    async def watch(scope: Scope, receive: Receive, send: Send) -> None:
        async def look_then_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                queue = idle.afterward.queue
                stored.extend(await queue.engine.list_tasks(TaskFilter(), limit=9))
            await send(message)

        await idle.app(scope, receive, look_then_send)

    with TestClient(watch) as client:
        response = client.post("/orders?recipient=ada@example.com")
    assert response.status_code == 202
    assert [(task.id, task.status) for task in stored] == [(response.json(), Status.QUEUED)]


def test_a_task_runs(tmp_path: Path) -> None:
    service = Service(tmp_path)
    with TestClient(service.app) as client:
        task_id = client.post("/orders?recipient=ada@example.com").json()
        until(lambda: service.read(client, task_id).status is Status.SUCCEEDED)
    assert service.sent == ["ada@example.com"]


def test_a_model_reaches_the_task_as_a_model(tmp_path: Path) -> None:
    service = Service(tmp_path)
    letter = Letter(recipient="ada@example.com", written_at=datetime.now(UTC))
    with TestClient(service.app) as client:
        task_id = client.post("/letters", json=letter.model_dump(mode="json")).json()
        until(lambda: service.read(client, task_id).status is Status.SUCCEEDED)
        assert service.read(client, task_id).result == letter.model_dump_json()
    assert service.sent == [letter]


def test_a_request_that_fails_leaves_no_task(idle: Service, client: TestClient) -> None:
    response = client.post("/changes-its-mind")
    assert response.status_code == 404
    with pytest.raises(TaskNotFound):
        idle.read(client, response.json()["detail"])


def test_the_location_is_the_task_or_the_batch(client: TestClient) -> None:
    response = client.post("/orders?recipient=ada@example.com")
    assert response.headers["Location"] == f"/tasks/{response.json()}"
    response = client.post("/newsletters?recipients=ada@example.com&recipients=grace@example.com")
    assert response.headers["Location"].startswith("/batches/")
    assert len(response.json()) == 2
    assert "Location" not in client.post("/nothing").headers


def test_a_task_can_be_retried(idle: Service, client: TestClient) -> None:
    task_id = client.post("/orders?recipient=ada@example.com").json()
    assert client.portal is not None
    client.portal.call(idle.afterward.queue.cancel, task_id)
    response = client.post(f"/retries/{task_id}")
    assert response.headers["Location"] == f"/tasks/{task_id}"
    assert idle.read(client, task_id).status is Status.QUEUED


def test_a_retry_is_a_transaction_of_its_own(idle: Service, client: TestClient) -> None:
    task_id = client.post("/orders?recipient=ada@example.com").json()
    assert client.portal is not None
    client.portal.call(idle.afterward.queue.cancel, task_id)
    with pytest.raises(ValueError, match="a transaction of its own"):
        client.post(f"/retries/{task_id}?and_more=true")
    assert idle.read(client, task_id).status is Status.CANCELLED


# Idempotency


def test_a_repeated_request_gets_the_first_response(idle: Service, client: TestClient) -> None:
    key = {"Idempotency-Key": "order-1"}
    first, second = (client.post("/orders?recipient=ada@example.com", headers=key) for _ in "12")
    assert (second.status_code, second.json()) == (202, first.json())
    assert second.headers["Location"] == first.headers["Location"]
    assert "Idempotency-Replay" not in first.headers
    assert second.headers["Idempotency-Replay"] == "true"
    assert count(idle, client) == 1


def test_a_repeated_request_gets_the_first_response_although_the_backlog_is_full(
    tmp_path: Path,
) -> None:
    service = Service(tmp_path, concurrency=0, max_backlog=1)
    with TestClient(service.app) as client:
        key, other = {"Idempotency-Key": "order-1"}, {"Idempotency-Key": "order-2"}
        path = "/orders?recipient=ada@example.com"
        first, second = (client.post(path, headers=key) for _ in "12")
        assert (second.status_code, second.json()) == (202, first.json())
        assert client.post(path, headers=other).status_code == 503


def test_a_repeated_request_without_a_task_gets_the_first_response(client: TestClient) -> None:
    key = {"Idempotency-Key": '"nothing"'}
    first, second = (client.post("/nothing", headers=key) for _ in "12")
    assert (first.status_code, second.status_code) == (202, 202)
    assert second.headers["Idempotency-Replay"] == "true"
    assert "Location" not in second.headers


def test_a_key_of_another_request_is_refused(idle: Service, client: TestClient) -> None:
    key = {"Idempotency-Key": "order-1"}
    client.post("/orders?recipient=ada@example.com", headers=key)
    response = client.post("/orders?recipient=grace@example.com", headers=key)
    assert response.status_code == 422
    assert "for another request" in response.json()["detail"]
    assert count(idle, client) == 1


def test_a_key_of_a_request_under_way_is_refused(idle: Service, client: TestClient) -> None:
    idle.afterward.queue.keys_in_flight.add("order-1")
    response = client.post("/nothing", headers={"Idempotency-Key": "order-1"})
    assert (response.status_code, response.headers["Retry-After"]) == (409, "1")


def test_a_malformed_key_is_refused(client: TestClient) -> None:
    response = client.post("/nothing", headers={"Idempotency-Key": "two words"})
    assert response.status_code == 400


@pytest.mark.parametrize("key", ["order-1", "two words"])
def test_the_key_of_a_request_that_only_reads_is_ignored(
    idle: Service, client: TestClient, key: str
) -> None:
    """Some clients send the header with every request."""
    idle.afterward.queue.keys_in_flight.add("order-1")
    responses = [client.get("/reads", headers={"Idempotency-Key": key}) for _ in "12"]
    assert [response.status_code for response in responses] == [202, 202]
    assert "Idempotency-Replay" not in responses[1].headers


def test_a_failed_request_leaves_its_key_free(idle: Service, client: TestClient) -> None:
    for _ in range(2):
        response = client.post("/changes-its-mind", headers={"Idempotency-Key": "order-1"})
        assert response.status_code == 404
    assert idle.afterward.queue.keys_in_flight == set()


def test_only_a_202_has_a_location_and_is_repeated(idle: Service, client: TestClient) -> None:
    key = {"Idempotency-Key": "order-1"}
    first, second = (client.post("/in-passing", headers=key) for _ in "12")
    assert (first.status_code, second.status_code) == (200, 200)
    assert "Location" not in first.headers
    assert first.json() != second.json()
    assert count(idle, client) == 2


# Wrong wiring


def test_an_app_without_a_queue_is_told_what_to_write() -> None:
    app = FastAPI()
    app.include_router(router)
    with (
        TestClient(app) as client,
        pytest.raises(RuntimeError, match=r"FastAPI\(lifespan=afterward\.lifespan\)"),
    ):
        client.post("/nothing")


def test_a_router_without_durable_route_is_told_what_to_write(idle: Service) -> None:
    careless = APIRouter()
    careless.post("/careless", status_code=202)(order)
    idle.app.include_router(careless)
    with (
        TestClient(idle.app) as client,
        pytest.raises(RuntimeError, match=r"APIRouter\(route_class=DurableRoute\)"),
    ):
        client.post("/careless?recipient=ada@example.com")


# A database that refuses


def refuse(service: Service, error: QueueError, monkeypatch: pytest.MonkeyPatch) -> None:
    async def put(*_: object) -> None:
        raise error

    monkeypatch.setattr(service.afterward.queue.engine, "put", put)


@pytest.mark.parametrize("error", [QueueUnavailable(), CommitUnknown()], ids=repr)
def test_a_database_that_refuses_is_a_503(
    idle: Service, client: TestClient, monkeypatch: pytest.MonkeyPatch, error: QueueError
) -> None:
    refuse(idle, error, monkeypatch)
    response = client.post("/orders?recipient=ada@example.com")
    assert (response.status_code, response.headers["Retry-After"]) == (503, "2")
    assert response.json() == {"detail": str(error)}


@pytest.mark.parametrize("handled", [QueueUnavailable, QueueError])
def test_an_exception_handler_of_the_app_wins(
    idle: Service, monkeypatch: pytest.MonkeyPatch, handled: type[QueueError]
) -> None:
    """Also a handler of the base class of all errors of the queue."""

    @idle.app.exception_handler(handled)
    async def explain(_: Request, error: Exception) -> PlainTextResponse:
        return PlainTextResponse(f"my own words: {error}", 500)

    refuse(idle, QueueUnavailable(), monkeypatch)
    with TestClient(idle.app) as client:
        response = client.post("/orders?recipient=ada@example.com")
    assert response.status_code == 500
    assert response.text.startswith("my own words: The database does not answer")


# Start and stop


def test_a_lifespan_of_the_apps_own_passes_the_queue_on(tmp_path: Path) -> None:
    service = Service(tmp_path, concurrency=0)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[dict[str, Any]]:
        async with service.afterward.lifespan(app) as state:
            yield {**state, "greeting": "hello"}

    app = FastAPI(lifespan=lifespan)
    app.include_router(router)

    @app.get("/greeting")
    async def greet(request: Request) -> str:
        return str(request.state.greeting)

    with TestClient(app) as client:
        assert client.get("/greeting").json() == "hello"
        task_id = client.post("/orders?recipient=ada@example.com").json()
        assert service.read(client, task_id).status is Status.QUEUED


def test_a_running_task_is_given_back_when_the_app_stops(tmp_path: Path) -> None:
    service = Service(tmp_path, grace_seconds=0.0)
    with TestClient(service.app) as client:
        task_id = client.post("/waits").json()
        until(lambda: service.sent == ["running"])
    with TestClient((later := Service(tmp_path, concurrency=0)).app) as client:
        task = later.read(client, task_id)
    assert (task.status, task.attempts) == (Status.QUEUED, 0)


@pytest.mark.anyio
async def test_worker_and_retention_end_with_the_app(tmp_path: Path) -> None:
    before = asyncio.all_tasks()
    async with Service(tmp_path).afterward.running():
        names = {task.get_name() for task in asyncio.all_tasks() - before}
        assert {"worker-claims", "worker-heartbeat", "retention"} <= names
    assert asyncio.all_tasks() == before


def test_finished_tasks_are_removed_after_the_retention_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention, "EVERY_SECONDS", 0.01)
    service = Service(tmp_path, retention_days=0.0)
    with TestClient(service.app) as client:
        client.post("/orders?recipient=ada@example.com")
        until(lambda: count(service, client) == 0)
    assert service.sent == ["ada@example.com"]


# Mistakes, and uses that are easily mistakes


@pytest.mark.parametrize("path", ["/form", "/stream"])
def test_a_request_that_cannot_be_repeated_works_without_a_key(
    idle: Service, client: TestClient, path: str
) -> None:
    answer = client.post(path, data={"recipient": "ada@example.com"})
    assert (answer.status_code, count(idle, client)) == (202, 1)


@pytest.mark.parametrize(
    ("path", "advice"), [("/form", "must set durable_tasks.body_digest"), ("/stream", "is stored")]
)
def test_a_request_that_cannot_be_repeated_says_why_if_it_has_a_key(
    idle: Service, client: TestClient, path: str, advice: str
) -> None:
    with pytest.raises(RuntimeError, match=advice):
        client.post(path, data={"recipient": "ada@example.com"}, headers={"Idempotency-Key": "1"})
    assert count(idle, client) == 0


def test_a_task_that_is_added_after_the_commit_is_an_error(client: TestClient) -> None:
    """It would be lost. The response has been sent by then, so the server logs the error."""
    with pytest.raises(RuntimeError, match="taken for its commit"):
        client.post("/too-late")


def test_a_location_of_the_routes_own_stays(client: TestClient) -> None:
    assert client.post("/orders/17").headers["Location"] == "/orders/17"


def test_one_key_and_one_path_in_two_mounted_apps_are_two_requests(idle: Service) -> None:
    app = FastAPI(lifespan=idle.afterward.lifespan)
    for prefix in ("/shop", "/library"):
        mounted = FastAPI()
        mounted.include_router(router)
        app.mount(prefix, mounted)
    ask = "/orders?recipient=ada@example.com"
    with TestClient(app) as client:
        answers = [
            client.post(prefix + ask, headers={"Idempotency-Key": "1"})
            for prefix in ("/shop", "/shop", "/library")
        ]
    assert [answer.status_code for answer in answers] == [202, 202, 422]
    assert answers[1].headers["Idempotency-Replay"] == "true"


def test_a_state_with_an_http_client_named_client_is_no_mistake(idle: Service) -> None:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[dict[str, Any]]:
        async with idle.afterward.lifespan(app) as state:
            yield {**state, "client": object()}

    app = FastAPI(lifespan=lifespan)
    app.include_router(router)
    with TestClient(app) as client:
        task_id = client.post("/orders?recipient=ada@example.com").json()
        assert idle.read(client, task_id).client == ""


def test_only_the_beginning_of_a_long_request_id_is_stored(idle: Service) -> None:
    """An index has the request ids, and PostgreSQL refuses a text that is too long for it."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[dict[str, Any]]:
        async with idle.afterward.lifespan(app) as state:
            yield {**state, "request_id": "r" * 9000}

    app = FastAPI(lifespan=lifespan)
    app.include_router(router)
    with TestClient(app) as client:
        task_id = client.post("/orders?recipient=ada@example.com").json()
        assert idle.read(client, task_id).request_id == "r" * 255


# Start and stop


def test_an_app_can_be_started_again(tmp_path: Path) -> None:
    """As tests do with `with TestClient(app)`, each time in an event loop of its own."""
    service = Service(tmp_path)
    for mails in (1, 2):
        with TestClient(service.app) as client:
            client.post("/orders?recipient=ada@example.com")
            until(lambda mails=mails: len(service.sent) == mails)


def test_an_app_on_postgresql_can_be_started_again(database_url: str) -> None:
    sent: list[str] = []
    afterward = Afterward(database_url, tasks=[send_email], tools=sent)
    app = FastAPI(lifespan=afterward.lifespan)
    app.include_router(router)
    for mails in (1, 2):
        with TestClient(app) as client:
            client.post("/orders?recipient=ada@example.com")
            until(lambda mails=mails: len(sent) == mails)


@pytest.mark.anyio
async def test_what_runs_is_not_started_twice(idle: Service) -> None:
    async with idle.afterward.running():
        with pytest.raises(CannotStart, match="running already"):
            async with idle.afterward.running():
                pass


@pytest.mark.anyio
async def test_a_second_queue_of_an_app_starts_without_its_lifespan(
    idle: Service, tmp_path: Path
) -> None:
    """In the state, its queue would replace the first one."""
    second = Afterward[list[Any]](f"sqlite:///{tmp_path}/second.db", tasks=[send_letter], tools=[])
    async with idle.afterward.lifespan(idle.app):
        with pytest.raises(CannotStart, match="this app has another Afterward object"):
            async with second.lifespan(idle.app):
                pass
        async with second.running() as queue, queue.transaction() as transaction:
            transaction.add_task(send_letter, Letter(recipient="", written_at=datetime.now(UTC)))


async def fails_at_its_exit() -> AsyncIterator[None]:
    """Raise an error after the `yield`."""
    yield
    raise RuntimeError("closing failed")


@pytest.mark.parametrize(("scope", "status"), [("function", 500), ("request", 202)])
def test_the_exit_of_a_dependency_comes_after_the_commit(
    idle: Service, scope: Any, status: int
) -> None:
    closing = APIRouter(route_class=DurableRoute)
    depends = Depends(fails_at_its_exit, scope=scope)
    closing.post("/closing", status_code=202, dependencies=[depends])(order)
    idle.app.include_router(closing)
    with TestClient(idle.app, raise_server_exceptions=False) as client:
        response = client.post("/closing?recipient=ada@example.com")
        assert (response.status_code, count(idle, client)) == (status, 1)


@pytest.mark.anyio
async def test_a_queue_that_does_not_run_refuses(idle: Service) -> None:
    durable_tasks = idle.afterward.queue.collect()
    durable_tasks.add_task(send_email, "ada@example.com")
    with pytest.raises(QueueUnavailable, match="not running"):
        await idle.afterward.queue.commit(durable_tasks.collected())
    async with idle.afterward.running():
        pass
    with pytest.raises(QueueUnavailable, match="not running"):
        await idle.afterward.queue.engine.get("1")


@pytest.mark.anyio
async def test_a_queue_on_postgresql_that_does_not_run_refuses(database_url: str) -> None:
    queue = Afterward(database_url, tasks=[send_email]).queue
    with pytest.raises(QueueUnavailable, match="not running"):
        await queue.engine.get("1")


@pytest.mark.parametrize(
    "settings", [{"concurrency": -1}, {"lease_seconds": 0.0}, {"timeout_seconds": 0.0}]
)
def test_wrong_settings_are_refused(tmp_path: Path, settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="more than 0 seconds"):
        Service(tmp_path, **settings)


@pytest.mark.parametrize("url", ["sqlite:///", "sqlite:///:memory:"])
def test_a_url_without_a_file_is_refused(url: str) -> None:
    with pytest.raises(CannotStart, match="names no file"):
        Afterward[None](url, tasks=[])
