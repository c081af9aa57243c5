"""POST /send-notification/{email}, which adds a promise and a courtesy in one request."""

from typing import Annotated, Any
from urllib.parse import unquote

from fastapi import APIRouter, BackgroundTasks, Body, Depends, Request
from starlette.convertors import StringConvertor, register_url_convertor
from starlette.exceptions import HTTPException

from afterward.fastapi import DurableTasks
from afterward.task import Task
from afterward.unit_of_work import UnitOfWork
from app.api.dependencies import check_recipient
from app.api.errors import documented
from app.api.route import ServiceRoute
from app.api.schemas import Address, LogText, Notification, Queued
from app.tasks.courtesies import write_log
from app.tasks.mail import send_email

router = APIRouter(tags=["notifications"], route_class=ServiceRoute)


class RecipientConvertor(StringConvertor):
    """Matches a part of a path that may be an address, even if its local part contains a slash.

    RFC 5322, 3.2.3, allows a slash there. A client sends it as %2F, but the server decodes the path
    before the routes are matched.
    """

    regex = "[^/]+|[^@]+@[^@/]+"


register_url_convertor("recipient", RecipientConvertor())


async def log_query(
    request: Request, background_tasks: BackgroundTasks, q: LogText | None = None
) -> None:
    """Log the query, if there is one. The tasks of a dependency run together with the route's."""
    if q:
        background_tasks.add_task(write_log, request.state.log_file, f"found query: {q}")


@router.post(
    "/send-notification/{email:recipient}",
    status_code=202,
    dependencies=[Depends(log_query)],
    responses=documented(404, 409, 413, 415, 422, 503, 507),
)
@router.post(
    "/send-notification/{email:recipient}/",
    status_code=202,
    dependencies=[Depends(log_query)],
    include_in_schema=False,
)
async def send_notification(
    email: Address,
    request: Request,
    background_tasks: BackgroundTasks,
    durable_tasks: DurableTasks,
    notification: Annotated[Notification, Body(default_factory=Notification)],
) -> Queued:
    """Queue a mail to `email`. The task is on disk before the 202, and the mail is sent later."""
    _check_slashes(request)
    task = add_notification(request, email, notification, background_tasks, durable_tasks)
    return Queued.of(task, "Notification queued")


def add_notification(
    request: Request,
    email: str,
    mail: Notification,
    background_tasks: BackgroundTasks,
    durable_tasks: UnitOfWork[Any],
) -> Task:
    """Add the promise to send a mail, and the courtesy of a line in the log file.

    Raises HTTPException 403 unless ALLOWED_RECIPIENTS permits mail to this address.
    """
    check_recipient(request, email)
    background_tasks.add_task(write_log, request.state.log_file, f"message to {email}")
    return durable_tasks.add_task(
        send_email, recipient=email, subject=mail.subject, message=mail.message
    )


def _check_slashes(request: Request) -> None:
    """Raise HTTPException 404 if the client sent a slash of the address as it is, not as %2F.

    Such a path has more parts than the route. For example, a client that sends
    /send-notification//ada@example.com probably means ada@example.com. But /ada@example.com is a
    valid address, too.
    """
    recipient = request.path_params["email"]
    if "/" in recipient:
        last_part = request.scope["raw_path"].rstrip(b"/").rpartition(b"/")[2]
        if unquote(last_part.decode("latin-1")) != recipient:
            raise HTTPException(404)
