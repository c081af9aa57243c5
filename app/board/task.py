"""/board/tasks/{id}: one task with its timeline, and the forms that cancel, retry or run it."""

from collections.abc import Awaitable
from urllib.parse import quote

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, Response

from afterward.errors import QueueError, TaskHasStarted, TaskNotGivenUp, TaskNotRetrying
from afterward.queue import Queue
from afterward.task import GIVEN_UP, WAITING, Status, Task
from app.api.dependencies import QueueDep
from app.api.forms import see_other
from app.api.page_texts import exact_time
from app.api.pages import page
from app.api.route import ServiceRoute
from app.board import json_values
from app.board.json_values import NamedValue
from app.board.shown_task import ShownTask, find_shown_task
from app.board.timeline import timeline
from app.tasks.tools import Tools

_REFUSALS = (TaskHasStarted, TaskNotGivenUp, TaskNotRetrying)
_OF_UPLOADS = {"save_upload", "make_thumbnail"}

router = APIRouter(include_in_schema=False, route_class=ServiceRoute)


@router.get("/board/tasks/{task_id}")
async def read_task(request: Request, task: ShownTask, queue: QueueDep) -> HTMLResponse:
    """Show a task."""
    return _task_page(request, queue, task)


@router.post("/board/tasks/{task_id}/retry")
async def retry_task(request: Request, task: ShownTask, queue: QueueDep) -> Response:
    """Queue a failed or cancelled task again."""
    return await _act(request, queue, task, queue.retry(task))


@router.post("/board/tasks/{task_id}/cancel")
async def cancel_task(request: Request, task: ShownTask, queue: QueueDep) -> Response:
    """Cancel a task that waits for its first or its next attempt."""
    return await _act(request, queue, task, queue.cancel(task.id))


@router.post("/board/tasks/{task_id}/run-now")
async def run_task_now(request: Request, task: ShownTask, queue: QueueDep) -> Response:
    """Make the next attempt of a failed task due at once."""
    return await _act(request, queue, task, queue.run_now(task.id))


async def _act(
    request: Request, queue: Queue[Tools], task: Task, action: Awaitable[Task]
) -> Response:
    """Carry out an action, and show the task. If the task has changed meanwhile, tell why not.

    A form that is sent twice does no harm: the second one is refused like this, or changes nothing.
    """
    try:
        await action
    except _REFUSALS as refusal:
        settings = request.state.settings
        task = await find_shown_task(task.id, queue, task.client, settings)
        return _task_page(request, queue, task, refusal=refusal)
    return see_other(f"/board/tasks/{task.id}")


def _task_page(
    request: Request, queue: Queue[Tools], task: Task, *, refusal: QueueError | None = None
) -> HTMLResponse:
    now, result = queue.now(), json_values.result(task.result)
    return page(
        request,
        "board/task.html",
        status=200 if refusal is None else 409,
        refusal=refusal,
        task=task,
        events=timeline(task, now),
        exact_time=exact_time,
        arguments=json_values.arguments(task.arguments) if task.arguments else None,
        result=result,
        mail=_mail(result) if task.kind == "send_email" else None,
        upload=task.about if task.kind in _OF_UPLOADS else None,
        actions=_actions(task, now),
        can_copy=task.kind == "send_email" and task.arguments,
    )


def _actions(task: Task, now: float) -> dict[str, str]:
    """Return the actions that the task allows: the last part of the form's path, and its button."""
    actions = {"retry": "Retry"} if task.status in GIVEN_UP else {}
    if task.status is Status.RETRYING and task.due_at > now:
        actions["run-now"] = "Run now"
    if task.status in WAITING:
        actions["cancel"] = "Cancel"
    return actions


def _mail(result: list[NamedValue]) -> str | None:
    """Return the path of the page with the mail that the catcher has received from a task."""
    fields = {value.name: value.text for value in result}
    message_id = fields.get("message_id", "")
    return f"/inbox/by-message-id/{quote(message_id.strip('<>'), safe='@')}" if message_id else None
