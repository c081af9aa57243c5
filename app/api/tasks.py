"""Tasks as a resource: what became of them, and what can still be done about it."""

import time
from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import APIRouter, Depends, Query
from fastapi.sse import EventSourceResponse

from app.api.dependencies import ClientDep, FeedDep, QueueDep
from app.api.feed import QUIET_SECONDS
from app.api.problems import documented
from app.api.promises import DurableTasksDep
from app.api.routes import Route
from app.api.schemas import Queued, Sought, TaskPage, TaskView
from app.queue.errors import TaskNotFound
from app.queue.task import FINISHED, Status, Task

router = APIRouter(tags=["tasks"], route_class=Route)

Limit = Annotated[int, Query(ge=1, le=100)]
After = Annotated[
    Sought | None, Query(description="The last id of the page before.", max_length=64)
]


@router.get("/tasks", responses=documented(404, 422, 503))
async def list_tasks(
    queue: QueueDep,
    client: ClientDep,
    status: Status | None = None,
    kind: Annotated[Sought | None, Query(max_length=100)] = None,
    limit: Limit = 50,
    after: After = None,
) -> TaskPage:
    """Tasks, newest first."""
    tasks = await queue.engine.list_tasks(
        client=client, status=status, kind=kind, after=after, limit=limit + 1
    )
    return TaskPage(data=[TaskView.of(task) for task in tasks[:limit]], has_more=len(tasks) > limit)


async def _existing(task_id: Sought, queue: QueueDep, client: ClientDep) -> Task:
    task = await queue.engine.get(task_id)
    if task.client != client:
        raise TaskNotFound
    return task


ExistingTask = Annotated[Task, Depends(_existing)]


@router.get("/tasks/{task_id}", responses=documented(404, 422, 503))
async def read_task(task: ExistingTask) -> TaskView:
    """One task."""
    return TaskView.of(task)


@router.post("/tasks/{task_id}/cancel", responses=documented(404, 409, 422, 503, 507))
async def cancel_task(task: ExistingTask, queue: QueueDep) -> TaskView:
    """Withdraw a task that waits for its first or its next attempt."""
    return TaskView.of(await queue.cancel(task.id))


@router.post(
    "/tasks/{task_id}/retry", status_code=202, responses=documented(404, 409, 422, 503, 507)
)
async def retry_task(task: ExistingTask, durable_tasks: DurableTasksDep) -> Queued:
    """Queue a failed or cancelled task afresh, with all its attempts."""
    durable_tasks.retry_task(task)
    return Queued.of(task, "Task queued again")


@router.get(
    "/tasks/{task_id}/events",
    response_class=EventSourceResponse,
    responses=documented(404, 422, 503),
)
async def task_events(
    task: ExistingTask, queue: QueueDep, feed: FeedDep
) -> AsyncIterator[TaskView]:
    """The task as it is, then each of its changes, until it is finished."""
    with feed.changes() as changes:
        task = await queue.engine.get(task.id)
        yield TaskView.of(task)
        if task.status in FINISHED:
            return
        look_again = time.monotonic() + QUIET_SECONDS
        async for changed in changes:
            if changed is None or changed.id != task.id:
                if time.monotonic() < look_again:
                    continue
                # What another process did may go untold; the record knows.
                look_again = time.monotonic() + QUIET_SECONDS
                changed = await queue.engine.get(task.id)  # noqa: PLW2901
                if changed.updated_at == task.updated_at:
                    continue
            task = changed
            yield TaskView.of(task)
            if task.status in FINISHED:
                return


@router.get("/events", response_class=EventSourceResponse, responses=documented())
async def all_events(feed: FeedDep, client: ClientDep) -> AsyncIterator[TaskView]:
    """Each change of any task, from now on; with API keys, of the client's own."""
    with feed.changes() as changes:
        async for task in changes:
            if task is not None and task.client == client:
                yield TaskView.of(task)
