"""/board/tasks/retry and /board/tasks/cancel: retry or cancel all tasks that a search has found.

GET shows a page to confirm, with the number of tasks on its button. POST carries the action out,
unless more tasks match by then: in that case it shows the page again, with the new number. So a
person never acts on more tasks than the button said. Fewer are possible, because a task may start,
or be retried by someone else, before it is its turn; the task of the action counts them.
"""

import hashlib
import re
import secrets
from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Request
from fastapi.responses import HTMLResponse, Response
from starlette.exceptions import HTTPException

from afterward.errors import KeyTaken
from afterward.fastapi import IdempotencyKeyReused
from afterward.queue import Queue
from afterward.task import Answer, Writes
from app.api.dependencies import ClientDep, QueueDep
from app.api.forms import read_form, see_other
from app.api.pages import page
from app.api.route import ServiceRoute
from app.api.task_actions import add_action, count_matches
from app.api.task_filters import TaskFilters
from app.board.task_search import TaskSearch, conditions_of, fixed
from app.tasks.tools import Tools

_KEY = re.compile(r"[\w-]{1,64}", re.ASCII)
_NUMBER = re.compile(r"\d{1,12}", re.ASCII)
_NO_FORM = "The form is not complete. Go back to the tasks, and choose the action again."
_NO_CONDITIONS = "Search for tasks first: an action on many tasks needs at least one condition."

router = APIRouter(include_in_schema=False, route_class=ServiceRoute)


async def _action_in_path(request: Request) -> Literal["retry", "cancel"]:
    return "retry" if request.url.path.endswith("/retry") else "cancel"


ActionDep = Annotated[Literal["retry", "cancel"], Depends(_action_in_path)]


@router.get("/board/tasks/retry")
@router.get("/board/tasks/cancel")
async def confirm(
    request: Request, action: ActionDep, queue: QueueDep, client: ClientDep
) -> HTMLResponse:
    """Ask whether to act on the tasks that match the query, and say how many they are."""
    now = queue.now()
    search = _readable(TaskSearch.read(request.query_params, now))
    filters = fixed(search.filters, now)
    matches = await count_matches(queue, action, filters.for_client(client), now)
    return _confirm_page(request, action, filters, matches)


@router.post("/board/tasks/retry")
@router.post("/board/tasks/cancel")
async def act(request: Request, action: ActionDep, queue: QueueDep, client: ClientDep) -> Response:
    """Queue the action, and show its task. Its progress tells how far it is."""
    form = await read_form(request)
    key, confirmed = form.get("key", ""), form.get("confirmed", "")
    if not _KEY.fullmatch(key) or not _NUMBER.fullmatch(confirmed):
        raise HTTPException(422, _NO_FORM)
    accepted_at = queue.now()
    filters = _readable(TaskSearch.read(form, accepted_at)).filters
    matches = await count_matches(queue, action, filters.for_client(client), accepted_at)
    if matches > int(confirmed):
        return _confirm_page(request, action, filters, matches, confirmed=int(confirmed))
    work = queue.collect(request.state.request_id, client)
    task = add_action(work, action, filters, client, accepted_at, matches)
    answer = Answer(
        key=f"{client} {key}".lstrip(),
        fingerprint=_fingerprint(action, filters),
        body="",
        location=f"/board/tasks/{task.id}",
        created_at=accepted_at,
    )
    return see_other(await _commit_once(queue, work.collected(answer), answer))


async def _commit_once(queue: Queue[Tools], writes: Writes, answer: Answer) -> str:
    """Commit the action, and return the path of its task.

    A form that is sent twice, for example by a double click, has the same key both times. Its
    second action is not written, and the path is that of the first.
    """
    try:
        await queue.commit(writes)
    except KeyTaken as taken:
        if taken.answer.fingerprint != answer.fingerprint:
            raise IdempotencyKeyReused from None
        return taken.answer.location
    return answer.location


def _readable(search: TaskSearch) -> TaskSearch:
    """Return the search. Raises HTTPException 422 if it has no conditions, or unreadable ones."""
    if search.errors:
        raise HTTPException(422, " ".join(f"{name}: {m}" for name, m in search.errors.items()))
    if not search.has_conditions:
        raise HTTPException(422, _NO_CONDITIONS)
    return search


def _fingerprint(action: str, filters: TaskFilters) -> str:
    return hashlib.sha256(f"{action} {conditions_of(filters)}".encode()).hexdigest()


def _confirm_page(
    request: Request,
    action: str,
    filters: TaskFilters,
    matches: int,
    *,
    confirmed: int | None = None,
) -> HTMLResponse:
    """Show the number of tasks. `confirmed` is a smaller number that was confirmed before."""
    return page(
        request,
        "board/confirm.html",
        status=200 if confirmed is None else 409,
        action=action,
        conditions=conditions_of(filters),
        matches=matches,
        confirmed=confirmed,
        key=secrets.token_urlsafe(16),
    )
