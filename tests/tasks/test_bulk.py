"""The durable tasks that retry and cancel many tasks: slices, crashes, stops and full backlogs."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from afterward import queue as queue_module
from afterward.backlog_limit import BacklogLimit
from afterward.bulk import Slice
from afterward.engines.sqlite.engine import SQLite
from afterward.errors import CommitUnknown, QueueUnavailable
from afterward.events import EventType
from afterward.filter import TaskFilter
from afterward.task import Outcome, Status, Task
from afterward.unit_of_work import Context
from afterward.worker import Worker
from app.tasks.bulk import cancel_tasks, retry_tasks
from tests.library.support import NOW, EventRecorder, a_task, claim_all, opened, put
from tests.support.task_runner import TaskRunner

pytestmark = pytest.mark.anyio

ALL = TaskFilter(kind="greet")  # no worker of the service knows this kind


@pytest.fixture
async def engine(tmp_path: Path) -> AsyncIterator[SQLite]:
    async with opened(tmp_path / "queue.db") as engine:
        yield engine


@pytest.fixture
def runner(engine: SQLite, monkeypatch: pytest.MonkeyPatch) -> TaskRunner:
    """A worker with the tasks of the service. A slice has two tasks."""
    monkeypatch.setattr(queue_module, "SLICE", 2)
    tools = SimpleNamespace()
    runner = TaskRunner(engine, tools)
    tools.queue = runner.queue
    return runner


async def failed_tasks(engine: SQLite, number: int, **changes: Any) -> list[Task]:
    tasks = [a_task(**changes) for _ in range(number)]
    await put(engine, *tasks)
    for task in await claim_all(engine):
        await engine.settle(task, Outcome(Status.FAILED, error="{}"), NOW)
    return tasks


async def count(engine: SQLite, *statuses: Status) -> int:
    return await engine.count_tasks(TaskFilter(kind="greet", statuses=statuses))


async def result(runner: TaskRunner, task: Task) -> dict[str, int]:
    """Return the result of a bulk action, which must have succeeded."""
    ended = await runner.read(task)
    assert (ended.status, ended.progress) == (Status.SUCCEEDED, 1.0)
    return cast("dict[str, int]", json.loads(ended.result or ""))


async def test_all_tasks_are_retried_in_slices_with_progress(
    engine: SQLite, runner: TaskRunner
) -> None:
    await failed_tasks(engine, 5)
    recorder = EventRecorder(runner.queue)
    action = await runner.add(retry_tasks, wanted=ALL, accepted_at=NOW, matched=5)
    await runner.run()
    assert await result(runner, action) == {"matched": 5, "done": 5, "skipped": 0}
    assert await count(engine, Status.QUEUED) == 5
    progress = [e.task.progress for e in recorder.events if e.type is EventType.PROGRESSED]
    assert progress == [0.4, 0.8, 1.0]


async def test_all_tasks_are_cancelled_in_slices(engine: SQLite, runner: TaskRunner) -> None:
    await put(engine, *(a_task() for _ in range(4)), later := a_task(at=NOW + 1))
    action = await runner.add(cancel_tasks, wanted=ALL, accepted_at=NOW, matched=4)
    await runner.run()
    assert await result(runner, action) == {"matched": 4, "done": 4, "skipped": 0}
    assert await count(engine, Status.CANCELLED) == 4
    assert (await engine.get(later.id)).status is Status.QUEUED


async def test_tasks_that_have_changed_in_the_meantime_are_skipped(
    engine: SQLite, runner: TaskRunner
) -> None:
    tasks = await failed_tasks(engine, 3)
    await runner.queue.retry(tasks[0])
    action = await runner.add(retry_tasks, wanted=ALL, accepted_at=NOW, matched=3)
    await runner.run()
    assert await result(runner, action) == {"matched": 3, "done": 2, "skipped": 1}


async def test_an_action_on_nothing_succeeds(runner: TaskRunner) -> None:
    action = await runner.add(retry_tasks, wanted=ALL, accepted_at=NOW, matched=0)
    await runner.run()
    assert await result(runner, action) == {"matched": 0, "done": 0, "skipped": 0}


async def test_no_more_tasks_are_changed_than_were_counted(
    engine: SQLite, runner: TaskRunner
) -> None:
    """A worker settles a task with a time just before the acceptance, just after the count."""
    await failed_tasks(engine, 3)
    action = await runner.add(retry_tasks, wanted=ALL, accepted_at=NOW, matched=2)
    await runner.run()
    assert await result(runner, action) == {"matched": 2, "done": 2, "skipped": 0}
    assert await count(engine, Status.FAILED) == 1


async def test_the_client_of_the_action_decides_and_not_its_arguments(
    engine: SQLite, runner: TaskRunner
) -> None:
    await failed_tasks(engine, 2, client="eve")
    wanted = TaskFilter(client="eve", kind="greet")
    async with runner.queue.transaction(client="ada") as transaction:
        action = transaction.add_task(retry_tasks, wanted=wanted, accepted_at=NOW, matched=2)
    await runner.run()
    assert await result(runner, action) == {"matched": 2, "done": 0, "skipped": 2}


async def test_an_action_begins_before_the_tasks_that_wait_already(
    engine: SQLite, runner: TaskRunner
) -> None:
    waiting = [a_task(kind="save_data", at=NOW - 60) for _ in range(30)]
    await put(engine, *waiting)
    wanted = TaskFilter(kind="save_data")
    action = await runner.add(cancel_tasks, wanted=wanted, accepted_at=NOW, matched=30)
    kinds, urgent = [*runner.queue.registry], runner.queue.registry.urgent
    claimed = await engine.claim("w", kinds=kinds, urgent=urgent, limit=1, now=NOW, lease=1)
    assert [task.id for task in claimed.running] == [action.id]


@pytest.mark.parametrize("error", [CommitUnknown, QueueUnavailable])
@pytest.mark.parametrize("is_written", [True, False])
async def test_a_slice_with_an_unknown_outcome_is_counted_once(
    engine: SQLite,
    runner: TaskRunner,
    monkeypatch: pytest.MonkeyPatch,
    error: type[Exception],
    is_written: bool,
) -> None:
    await failed_tasks(engine, 7)
    change_slice, calls = engine.change_slice, 0

    async def lose_replies(*args: Any, **kwargs: Any) -> Slice | None:
        nonlocal calls
        calls += 1
        if calls % 2:
            if is_written:
                await change_slice(*args, **kwargs)
            raise error
        return await change_slice(*args, **kwargs)

    monkeypatch.setattr(engine, "change_slice", lose_replies)
    action = await runner.add(retry_tasks, wanted=ALL, accepted_at=NOW, matched=7)
    await runner.run(seconds=3600)
    assert await result(runner, action) == {"matched": 7, "done": 7, "skipped": 0}
    assert (await runner.read(action)).attempts > 1


async def test_a_full_backlog_puts_the_rest_off(engine: SQLite, runner: TaskRunner) -> None:
    tasks = await failed_tasks(engine, 5)
    runner.queue._backlog_limit = BacklogLimit(engine.backlog, 4)
    action = await runner.add(retry_tasks, wanted=ALL, accepted_at=NOW, matched=5)
    await runner.run(seconds=600)
    waiting = await runner.read(action)
    assert (waiting.status, await count(engine, Status.QUEUED)) == (Status.RETRYING, 3)
    assert "as many unfinished tasks as the queue takes" in str(waiting.error)
    for task in tasks[2:]:
        await runner.queue.cancel(task.id)
    await runner.run(seconds=60)
    assert await result(runner, action) == {"matched": 5, "done": 5, "skipped": 0}


async def test_an_action_that_its_worker_gives_back_goes_on_later(
    engine: SQLite, runner: TaskRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGTERM stops the worker in the middle of the action, and even of a slice."""
    await failed_tasks(engine, 6)
    change_slice, calls, stuck = engine.change_slice, 0, asyncio.Event()

    async def get_stuck(*args: Any, **kwargs: Any) -> Slice | None:
        nonlocal calls
        calls += 1
        piece = await change_slice(*args, **kwargs)
        if calls == 2:
            stuck.set()
            await asyncio.Event().wait()
        return piece

    monkeypatch.setattr(engine, "change_slice", get_stuck)
    action = await runner.add(retry_tasks, wanted=ALL, accepted_at=NOW, matched=6)
    stopping: Worker[Any] = Worker(runner.queue, SimpleNamespace(queue=runner.queue))
    await stopping.start()
    await asyncio.wait_for(stuck.wait(), 10)
    await stopping.stop(grace=0)
    assert (await runner.read(action)).status is Status.QUEUED
    assert await count(engine, Status.QUEUED) == 4
    await runner.run()
    assert await result(runner, action) == {"matched": 6, "done": 6, "skipped": 0}
    assert (await runner.read(action)).attempts == 1


async def test_an_attempt_that_has_lost_its_task_ends(engine: SQLite, runner: TaskRunner) -> None:
    """Another worker has the task, and goes on with the action."""
    await failed_tasks(engine, 2)
    lost = SimpleNamespace(
        task=a_task(), tools=SimpleNamespace(queue=runner.queue), report_progress=None
    )
    with pytest.raises(Exception, match="another worker has this task"):
        await retry_tasks(cast("Context[Any]", lost), wanted=ALL, accepted_at=NOW, matched=2)
    assert await count(engine, Status.FAILED) == 2
