"""The routes under /tasks and /events: list, read, cancel, retry and follow tasks."""

import asyncio
from collections.abc import AsyncGenerator, Iterable
from functools import partial
from typing import Annotated

from fastapi import APIRouter, Depends, Header, Query, Response
from pydantic import ConfigDict, Field
from starlette.convertors import StringConvertor, register_url_convertor

from afterward.engine import Engine
from afterward.errors import QueueUnavailable, TaskNotFound
from afterward.fastapi import DurableTasks
from afterward.task import FINISHED, Task
from app.api.dependencies import ClientDep, EventStreamDep, QueueDep, ReplayDep
from app.api.errors import documented
from app.api.event_stream import QUIET_SECONDS, Change, Reader, event_id
from app.api.replay import Replay
from app.api.route import ServiceRoute
from app.api.schemas import Pattern, Queued, SearchText, TaskDetail, TaskPage, TaskView
from app.api.server_sent_events import (
    DOCUMENTED,
    FELL_BEHIND,
    HEARTBEAT,
    REMOVED,
    RETRY,
    WAS_AWAY,
    EventStreamResponse,
    change_event,
    gap_event,
    position,
)
from app.api.task_filters import TASK_ID, TaskFilters

router = APIRouter(tags=["tasks"], route_class=ServiceRoute)


class TaskIdConvertor(StringConvertor):
    """Matches the id of a task, but not the last part of /tasks/retry and /tasks/cancel.

    Those paths only have POST. Without this, GET would look for a task of that name.
    """

    regex = "(?!(?:retry|cancel)$)[^/]+"


register_url_convertor("task_id", TaskIdConvertor())


class TaskQuery(TaskFilters):
    """The filters and the page of a list of tasks."""

    # A parameter that is not known here is ignored, as on the other routes.
    model_config = ConfigDict(extra="ignore")

    limit: Annotated[int, Field(ge=1, le=100)] = 50
    after: Annotated[
        Annotated[str, Pattern(TASK_ID, "must be the id of a task")] | None,
        Field(
            description="The last id of the previous page. Retention may have removed that task."
        ),
    ] = None


@router.get("/tasks", responses=documented(422, 503))
async def list_tasks(
    query: Annotated[TaskQuery, Query()], queue: QueueDep, client: ClientDep
) -> TaskPage:
    """List tasks, newest first."""
    tasks = await queue.engine.list_tasks(
        query.for_client(client), after=query.after, limit=query.limit + 1
    )
    return TaskPage(
        data=[TaskView.of(task) for task in tasks[: query.limit]],
        has_more=len(tasks) > query.limit,
    )


async def find_task(task_id: SearchText, queue: QueueDep, client: ClientDep) -> Task:
    """Return a task of this client. Raises TaskNotFound."""
    task = await queue.get(task_id)
    if task.client != client:
        raise TaskNotFound
    return task


ExistingTask = Annotated[Task, Depends(find_task)]


@router.get("/tasks/{task_id:task_id}", responses=documented(404, 422, 503))
async def read_task(task: ExistingTask) -> TaskDetail:
    """Read one task, with its failed attempts."""
    return TaskDetail.of(task)


@router.post("/tasks/{task_id}/cancel", responses=documented(404, 409, 422, 503, 507))
async def cancel_task(task: ExistingTask, queue: QueueDep) -> TaskDetail:
    """Cancel a task that waits for its first or its next attempt."""
    return TaskDetail.of(await queue.cancel(task.id))


@router.post(
    "/tasks/{task_id}/retry", status_code=202, responses=documented(404, 409, 422, 503, 507)
)
async def retry_task(task: ExistingTask, durable_tasks: DurableTasks) -> Queued:
    """Queue a failed or cancelled task again. Its attempts are counted from zero."""
    durable_tasks.retry_task(task)
    return Queued.of(task, "Task queued again")


LastEventId = Annotated[
    str | None,
    Header(
        alias="Last-Event-ID",
        description="The id of the last event that the client has read. A browser's EventSource "
        "sends it when it reconnects.",
    ),
]
_ENDED = {
    204: {"description": "The client has read the `end` of this task, and need not reconnect."}
}


@router.get(
    "/tasks/{task_id}/events",
    response_class=Response,
    responses=DOCUMENTED | _ENDED | documented(404, 422, 503),
)
async def task_events(
    task: ExistingTask,
    queue: QueueDep,
    event_stream: EventStreamDep,
    last_event_id: LastEventId = None,
) -> Response:
    """Follow one task: the first event is the task as it is now, the next ones are its changes.

    The last event is an `end` with the finished task. A client that has read it already gets 204,
    which tells an EventSource not to reconnect.
    """
    if task.status in FINISHED and last_event_id == event_id(task.updated_at, task.id):
        return Response(status_code=204)
    return EventStreamResponse(
        event_stream.reader(task.client, task.id),
        partial(_write_task_events, task.id, queue.engine),
    )


async def _write_task_events(
    task_id: str, engine: Engine, reader: Reader
) -> AsyncGenerator[bytes, None]:
    # 1. The task as it is now.
    last = Change.of(await engine.get(task_id))
    yield RETRY + change_event(last, last=last.finished)
    # 2. Its changes, until it is finished or the reader ends. After QUIET_SECONDS without a change,
    # `changes` is empty.
    while not last.finished and (changes := await anext(reader, None)) is not None:
        try:
            news = _newer(changes, last) or await _read_missed_change(engine, last)
        except TaskNotFound:
            yield gap_event(REMOVED, last.id)
            return
        yield b"".join(change_event(change, last=change.finished) for change in news) or HEARTBEAT
        last = news[-1] if news else last
    if reader.fell_behind:
        yield gap_event(FELL_BEHIND, last.id)


def _newer(changes: Iterable[Change], last: Change) -> list[Change]:
    """Return the changes after `last`, up to the one that finishes the task.

    Some changes may be older than `last`, because the reader is opened before the task is read.
    """
    newer: list[Change] = []
    for change in changes:
        if change.updated_at > last.updated_at:
            newer.append(change)
            if change.finished:
                break
    return newer


async def _read_missed_change(engine: Engine, last: Change) -> list[Change]:
    """Read the task, and return it if it has changed without an event.

    That happens if a process dies between the commit and the event. Raises TaskNotFound if
    retention has removed the task.
    """
    try:
        # A database that hangs must not delay the next heartbeat for long.
        async with asyncio.timeout(QUIET_SECONDS):
            change = Change.of(await engine.get(last.task_id))
    except (QueueUnavailable, TimeoutError):
        return []  # the stream goes on, and reads the task again later
    return [] if change.id == last.id else [change]


@router.get("/events", response_class=Response, responses=DOCUMENTED | documented(422))
async def all_events(
    event_stream: EventStreamDep,
    replay: ReplayDep,
    client: ClientDep,
    last_event_id: LastEventId = None,
) -> Response:
    """Follow all tasks: each change from now on. With API keys, only the client's own tasks.

    A client that returns with `Last-Event-ID` first gets the tasks that have changed in the
    meantime, each once, as it is now. Some events may come twice. A `gap` says that events are
    missing, because the client reads too slowly, or too much has changed since it was here.
    """
    return EventStreamResponse(
        event_stream.reader(client), partial(_write_all_events, replay, client, last_event_id)
    )


async def _write_all_events(
    replay: Replay, client: str, last_event_id: str | None, reader: Reader
) -> AsyncGenerator[bytes, None]:
    reader.last_id = replay.position
    yield RETRY
    # 1. Begin with the changes that the client has missed: see app.api.replay.
    if last_event_id is None:
        yield position(reader.position)
    else:
        give = reader.expect_replay(last_event_id)
        missed = await replay.read_missed(client, last_event_id)
        give(missed or ())
        if missed is None:
            yield gap_event(WAS_AWAY, reader.position)
    # 2. Go on with the changes from now on.
    async for changes in reader:
        yield b"".join(map(change_event, changes)) or HEARTBEAT
    # 3. Say where to go on. That is not after the last event if changes before it are lost.
    if reader.fell_behind:
        yield gap_event(FELL_BEHIND, reader.position)
    else:
        yield position(reader.position)
