"""/board/send: a form that sends a notification, by the code of POST /send-notification."""

import json
from typing import Annotated, Any

from fastapi import APIRouter, BackgroundTasks, Query, Request, Response
from fastapi.responses import HTMLResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from afterward.task import Task
from app.api.dependencies import ClientDep, QueueDep, SettingsDep
from app.api.forms import FormFields, messages_of, read_form, see_other
from app.api.pages import page
from app.api.route import ServiceRoute
from app.api.routes.notifications import add_notification
from app.api.schemas import Address, Notification, SearchText
from app.board.form_keys import commit_once, new_form_key
from app.board.shown_task import find_shown_task

_HIDDEN = "HIDE_ARGUMENTS is set, so the form does not show the mail of a task."
_NO_MAIL = "This task cannot be copied: its arguments are not those of a valid mail."

router = APIRouter(include_in_schema=False, route_class=ServiceRoute)


class MailForm(Notification):
    """The fields of the form."""

    recipient: Address


@router.get("/board/send")
async def read_send(
    request: Request,
    queue: QueueDep,
    client: ClientDep,
    settings: SettingsDep,
    like: Annotated[SearchText | None, Query(max_length=64)] = None,
) -> HTMLResponse:
    """Show the form, filled with the defaults, or with the mail of the task with the id `like`."""
    fields = {"recipient": "", **Notification().model_dump()}
    if like is not None:
        fields = _mail_of(await find_shown_task(like, queue, client, settings))
    return _send_page(request, fields)


def _mail_of(task: Task) -> dict[str, Any]:
    """Return the fields of the mail that a task sends. Raises HTTPException 422 for other tasks."""
    if not task.arguments:
        raise HTTPException(422, _HIDDEN)
    try:
        return MailForm.model_validate(json.loads(task.arguments)["kwargs"]).model_dump()
    except (ValueError, TypeError, KeyError):
        raise HTTPException(422, _NO_MAIL) from None


@router.post("/board/send")
async def send(request: Request, queue: QueueDep, client: ClientDep) -> Response:
    """Queue the mail, then show its task. Sent twice, the same form queues and logs one mail."""
    form = await read_form(request)
    fields = _read_fields(form)
    unit_of_work, courtesies = queue.collect(request.state.request_id, client), BackgroundTasks()
    try:
        mail = MailForm(**fields)
        task = add_notification(request, mail.recipient, mail, courtesies, unit_of_work)
    except ValidationError as error:
        return _send_page(request, fields, errors=messages_of(error), status=422)
    except HTTPException as error:
        errors = {"recipient": error.detail}
        return _send_page(request, fields, errors=errors, status=error.status_code)
    location = f"/board/tasks/{task.id}"
    shown = await commit_once(queue, unit_of_work, form, client, location)
    response = see_other(shown)
    response.background = courtesies if shown == location else None
    return response


def _read_fields(form: FormFields) -> dict[str, str]:
    """Return the fields of the mail. A browser ends the lines of a text with CR LF."""
    return {name: form.get(name, "").replace("\r\n", "\n") for name in MailForm.model_fields}


def _send_page(
    request: Request,
    fields: dict[str, str],
    *,
    errors: dict[str, str] | None = None,
    status: int = 200,
) -> HTMLResponse:
    return page(
        request,
        "board/send.html",
        status=status,
        form_key=new_form_key(),
        fields=fields,
        errors=errors or {},
    )
