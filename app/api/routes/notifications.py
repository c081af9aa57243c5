"""POST /send-notification/{email}: a courtesy and a promise side by side."""

from typing import Annotated
from urllib.parse import unquote

from fastapi import APIRouter, BackgroundTasks, Body, Depends, Request
from starlette.convertors import StringConvertor, register_url_convertor
from starlette.exceptions import HTTPException

from afterward.fastapi import DurableTasks
from app.api.dependencies import permit
from app.api.errors import documented
from app.api.route import ServiceRoute
from app.api.schemas import Address, LogText, Notification, Queued
from app.tasks.courtesies import write_log
from app.tasks.mail import send_email

router = APIRouter(tags=["notifications"], route_class=ServiceRoute)


class RecipientConvertor(StringConvertor):
    """Matches a part of a path that may be an address, also one with a slash in its local part.

    RFC 5322, 3.2.3, allows a slash there. A client sends it as %2F, which the server has decoded by
    the time that the path is matched.
    """

    regex = "[^/]+|[^@]+@[^@/]+"


register_url_convertor("recipient", RecipientConvertor())


async def log_query(
    request: Request, background_tasks: BackgroundTasks, q: LogText | None = None
) -> None:
    """Log the query, if there is one: a task added in a dependency joins those of the route."""
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
    notification: Annotated[Notification | None, Body()] = None,
) -> Queued:
    """Queue a mail to `email`. It is on disk before the 202, and sent after it."""
    _check_slashes(request)
    permit(request, email)
    mail = notification or Notification()
    background_tasks.add_task(write_log, request.state.log_file, f"message to {email}")
    task = durable_tasks.add_task(
        send_email, recipient=email, subject=mail.subject, message=mail.message
    )
    return Queued.of(task, "Notification queued")


def _check_slashes(request: Request) -> None:
    """Raise HTTPException 404 where a slash in the address was not sent as %2F.

    Such a path has more parts than the route. For example, the client that sends
    /send-notification//ada@example.com means ada@example.com; but /ada@example.com is an address,
    too.
    """
    recipient = request.path_params["email"]
    if "/" in recipient:
        last_part = request.scope["raw_path"].rstrip(b"/").rpartition(b"/")[2]
        if unquote(last_part.decode("latin-1")) != recipient:
            raise HTTPException(404)
