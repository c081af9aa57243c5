"""GET /board/tasks: the search for tasks, and its results page by page."""

import re
from dataclasses import dataclass, replace
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import HTMLResponse

from afterward.errors import TaskNotFound
from afterward.queue import Queue
from afterward.task import Status, Task
from app.api.dependencies import ClientDep, QueueDep, SettingsDep
from app.api.forms import see_other
from app.api.page_texts import query_with
from app.api.pages import example, page
from app.api.route import ServiceRoute
from app.api.task_filters import TASK_ID
from app.board.counts import Matches
from app.board.dependencies import BoardDep
from app.board.error_line import error_line
from app.board.shown_task import find_shown_task
from app.board.task_search import PERIODS, TaskSearch, is_local_time
from app.settings import Settings
from app.tasks.tools import Tools

LISTED = 50

_ID = re.compile(TASK_ID)
_BAD_AFTER = "This is no page of a list. Go to the newest tasks."

router = APIRouter(include_in_schema=False, route_class=ServiceRoute)


@dataclass(frozen=True, slots=True)
class TaskRow:
    """A task as a row of the table.

    `seconds` is the duration of its latest attempt, or None if it is unknown: the end of
    a crashed attempt is not stored, and `finished_at` is the time at which another worker found it.
    """

    task: Task
    seconds: float | None
    error: str

    @classmethod
    def of(cls, task: Task, now: float) -> "TaskRow":
        """Return the row of a task."""
        end = now if task.status is Status.RUNNING else task.finished_at
        has_crashed = task.status is Status.FAILED and task.crashes > 0
        has_run = task.status in {Status.RUNNING, Status.SUCCEEDED, Status.FAILED}
        known = has_run and not has_crashed and task.started_at is not None and end is not None
        seconds = max(0.0, end - task.started_at) if known else None  # type: ignore[operator]
        return cls(task, seconds, error_line(task.error))


@router.get("/board/tasks")
async def read_tasks(
    request: Request,
    queue: QueueDep,
    client: ClientDep,
    settings: SettingsDep,
    board: BoardDep,
) -> Response:
    """Show the form, and a page of the tasks that match it, newest first.

    Where the id of a task is searched for, go to the task: people paste ids from log lines.
    """
    now = queue.now()
    search = TaskSearch.read(request.query_params, now)
    after = request.query_params.get("after") or None
    if after is not None and not _ID.fullmatch(after):
        search = replace(search, errors=search.errors | {"after": _BAD_AFTER})
    if search.errors:
        return _tasks_page(request, queue, search, status=422)
    wanted = search.filters.for_client(client)
    tasks = await queue.engine.list_tasks(wanted, after=after, limit=LISTED + 1)
    if not tasks and await _is_task(search.filters.about, queue, client, settings):
        return see_other(f"/board/tasks/{search.filters.about}")
    return _tasks_page(
        request,
        queue,
        search,
        status=200 if tasks or after is None else 404,
        rows=[TaskRow.of(task, now) for task in tasks[:LISTED]],
        older=query_with(request, after=tasks[LISTED - 1].id) if len(tasks) > LISTED else None,
        is_first=after is None,
        matches=await board.counts.matches(search, client) if search.has_conditions else Matches(),
    )


async def _is_task(text: str | None, queue: Queue[Tools], client: str, settings: Settings) -> bool:
    """Whether the text is the id of a task of this client."""
    if text is None or not _ID.fullmatch(text):
        return False
    try:
        await find_shown_task(text, queue, client, settings)
    except TaskNotFound:
        return False
    return True


def _tasks_page(
    request: Request, queue: Queue[Tools], search: TaskSearch, *, status: int, **found: Any
) -> HTMLResponse:
    nothing: dict[str, Any] = {"rows": [], "older": None, "is_first": True, "matches": Matches()}
    return page(
        request,
        "board/tasks.html",
        status=status,
        search=search,
        kinds=sorted({*queue.registry, search.typed["kind"]} - {""}),
        statuses=list(Status),
        periods=PERIODS,
        is_local_time=is_local_time,
        example=example(request),
        newest=query_with(request, after=None),
        **(nothing | found),
    )
