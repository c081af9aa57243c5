"""POST /send-notification/{email}: a courtesy and a promise side by side."""

from typing import Annotated

from fastapi import APIRouter, BackgroundTasks, Body, Depends, Request

from app.api.dependencies import permit
from app.api.problems import documented
from app.api.promises import DurableTasksDep
from app.api.routes import Route
from app.api.schemas import Address, LogText, Notification, Queued
from app.tasks.courtesies import write_log
from app.tasks.mail import send_email

router = APIRouter(tags=["notifications"], route_class=Route)


async def log_query(
    request: Request, background_tasks: BackgroundTasks, q: LogText | None = None
) -> None:
    """Log the query, if there is one: a task added in a dependency joins those of the route."""
    if q:
        background_tasks.add_task(write_log, request.state.log_file, f"found query: {q}")


@router.post(
    "/send-notification/{email}",
    status_code=202,
    dependencies=[Depends(log_query)],
    responses=documented(404, 409, 413, 415, 422, 503, 507),
)
@router.post(
    "/send-notification/{email}/",
    status_code=202,
    dependencies=[Depends(log_query)],
    include_in_schema=False,
)
async def send_notification(
    email: Address,
    request: Request,
    background_tasks: BackgroundTasks,
    durable_tasks: DurableTasksDep,
    notification: Annotated[Notification | None, Body()] = None,
) -> Queued:
    """Queue a mail to `email`. It is on disk before the 202, and sent after it."""
    permit(request, email)
    mail = notification or Notification()
    background_tasks.add_task(write_log, request.state.log_file, f"message to {email}")
    task = durable_tasks.add_task(send_email, to=email, subject=mail.subject, message=mail.message)
    return Queued.of(task, "Notification queued")
