"""/board/tasks/retry and /board/tasks/cancel: retry or cancel all tasks that a search has found.

GET counts the tasks, and shows a page to confirm, with their number on its button. POST carries the
action out on these tasks, as they were at the time of the count: the form has that time. So the
action never changes more tasks than the button said. It changes fewer if a task has changed since
then, because a worker has begun it, for example. The task of the action counts those as skipped.
"""

import re
from typing import Annotated

from fastapi import APIRouter, Depends, Request
from fastapi.responses import HTMLResponse, Response
from starlette.exceptions import HTTPException

from afterward.bulk import Action
from app.api.dependencies import ClientDep, QueueDep
from app.api.forms import FormFields, read_form, see_other
from app.api.pages import page
from app.api.route import ServiceRoute
from app.api.task_actions import add_action, count_matches
from app.api.task_filters import TaskFilters
from app.board.form_keys import commit_once, new_form_key
from app.board.task_search import Fields, TaskSearch, conditions_of

_NUMBER = re.compile(r"\d{1,12}", re.ASCII)
_TIME = re.compile(r"\d{1,11}(\.\d{1,9})?", re.ASCII)  # seconds since the epoch
_NO_FORM = "The form is not complete. Go back to the tasks, and choose the action again."
_NO_CONDITIONS = "Search for tasks first: an action on many tasks needs at least one condition."

router = APIRouter(include_in_schema=False, route_class=ServiceRoute)


async def _action_in_path(request: Request) -> Action:
    return Action.RETRY if request.url.path.endswith("/retry") else Action.CANCEL


ActionDep = Annotated[Action, Depends(_action_in_path)]


@router.get("/board/tasks/retry")
@router.get("/board/tasks/cancel")
async def confirm(
    request: Request, action: ActionDep, queue: QueueDep, client: ClientDep
) -> HTMLResponse:
    """Ask whether to act on the tasks that match the query, and say how many they are."""
    now = queue.now()
    filters = _read_filters(request.query_params, now)
    return page(
        request,
        "board/confirm.html",
        action=action,
        conditions=conditions_of(filters),
        matches=await count_matches(queue, action, filters.for_client(client), now),
        counted_at=now,
        form_key=new_form_key(),
    )


@router.post("/board/tasks/retry")
@router.post("/board/tasks/cancel")
async def act(request: Request, action: ActionDep, queue: QueueDep, client: ClientDep) -> Response:
    """Queue the action, and show its task. Its progress tells how far it is."""
    form = await read_form(request)
    matches, counted_at = _read_count(form, queue.now())
    filters = _read_filters(form, counted_at)
    unit_of_work = queue.collect(request.state.request_id, client)
    task = add_action(unit_of_work, action, filters, client, counted_at, matches)
    location = f"/board/tasks/{task.id}"
    return see_other(await commit_once(queue, unit_of_work, form, client, location))


def _read_count(form: FormFields, now: float) -> tuple[int, float]:
    """Return the number of tasks that was confirmed, and the time of the count.

    The time is `now` at the latest. Raises HTTPException 422 if the form lacks one of them.
    """
    matches, counted_at = form.get("matches", ""), form.get("counted_at", "")
    if not _NUMBER.fullmatch(matches) or not _TIME.fullmatch(counted_at):
        raise HTTPException(422, _NO_FORM)
    return int(matches), min(float(counted_at), now)


def _read_filters(fields: Fields, now: float) -> TaskFilters:
    """Return the filters. Raises HTTPException 422 if there are none, or unreadable ones."""
    search = TaskSearch.read(fields, now)
    if search.errors:
        raise HTTPException(422, " ".join(f"{name}: {m}" for name, m in search.errors.items()))
    if not search.has_conditions:
        raise HTTPException(422, _NO_CONDITIONS)
    return search.filters
