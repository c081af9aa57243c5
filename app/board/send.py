"""/board/send: a form that sends a notification, by the code of POST /send-notification."""

import hashlib
import json
import re
from typing import Annotated, Any

from fastapi import APIRouter, BackgroundTasks, Query, Request, Response
from fastapi.responses import HTMLResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from afterward.errors import KeyTaken
from afterward.task import Answer, Task, new_id
from app.api.dependencies import ClientDep, QueueDep, SettingsDep
from app.api.errors import message_of
from app.api.forms import read_form, see_other
from app.api.pages import page
from app.api.route import ServiceRoute
from app.api.routes.notifications import add_notification
from app.api.routes.tasks import find_task
from app.api.schemas import Address, Notification, SearchText

_FORM_ID = re.compile(r"[0-9a-f-]{36}", re.ASCII)
_HIDDEN = "HIDE_ARGUMENTS is set, so the form does not show the mail of a task."
_NO_MAIL = "This task sends no mail that could be sent again today."

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
        if settings.hide_arguments:
            raise HTTPException(422, _HIDDEN)
        fields = _mail_of(await find_task(like, queue, client))
    return _send_page(request, new_id(queue.now()), fields)


def _mail_of(task: Task) -> dict[str, Any]:
    """Return the fields of the mail that a task sends. Raises HTTPException 422 for other tasks."""
    try:
        return MailForm.model_validate(json.loads(task.arguments)["kwargs"]).model_dump()
    except (ValueError, TypeError, KeyError):
        raise HTTPException(422, _NO_MAIL) from None


@router.post("/board/send")
async def send(
    request: Request, queue: QueueDep, client: ClientDep, background_tasks: BackgroundTasks
) -> Response:
    """Queue the mail, then show its task.

    The form has an id. If the browser sends the same form twice, because of a double click or a
    reload, the second one leads to the task of the first.
    """
    # 1. Read the fields. A browser ends the lines of a text with CR LF.
    form = await read_form(request)
    fields = {name: form.get(name, "").replace("\r\n", "\n") for name in MailForm.model_fields}
    form_id = form.get("form_id", "")
    if not _FORM_ID.fullmatch(form_id):
        form_id = new_id(queue.now())
    # 2. Check them, and add the task to a unit of work.
    unit_of_work = queue.collect(request.state.request_id, client)
    try:
        mail = MailForm(**fields)
        task = add_notification(request, mail.recipient, mail, background_tasks, unit_of_work)
    except ValidationError as error:
        return _send_page(request, form_id, fields, status=422, errors=_messages(error))
    except HTTPException as error:
        errors = {"recipient": error.detail}
        return _send_page(request, form_id, fields, status=error.status_code, errors=errors)
    # 3. Commit it under the id of the form.
    digest = hashlib.sha256(repr(fields).encode()).hexdigest()
    location = f"/board/tasks/{task.id}"
    key = f"{client} form:{form_id}".lstrip()
    answer = Answer(f"{key}:{digest}", digest, "{}", location, queue.now())
    try:
        await queue.commit(unit_of_work.collected(answer))
    except KeyTaken as taken:
        location = taken.answer.location
    return see_other(location)


def _messages(error: ValidationError) -> dict[str, str]:
    """Return a message for each field that is not valid. No message repeats the value."""
    return {
        str(details["loc"][0]): message_of(details)
        for details in error.errors(include_input=False, include_url=False)
    }


def _send_page(
    request: Request,
    form_id: str,
    fields: dict[str, str],
    *,
    status: int = 200,
    errors: dict[str, str] | None = None,
) -> HTMLResponse:
    return page(
        request,
        "board/send.html",
        status=status,
        form_id=form_id,
        fields=fields,
        errors=errors or {},
    )
