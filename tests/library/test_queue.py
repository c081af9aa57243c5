"""The queue: it writes each change to the database first, and then publishes its event."""

import contextlib
from unittest.mock import Mock

import pytest

from afterward.engine import Engine
from afterward.errors import KeyTaken, TaskHasStarted, TaskNotFound, TaskNotGivenUp
from afterward.task import Answer, Status, Writes
from afterward.unit_of_work import Context
from tests.library.support import NOW, Clock, EventRecorder, claim_one, promise, queue_of

pytestmark = pytest.mark.anyio


async def greet(context: Context[None], name: str) -> None:
    """Greet a person."""


async def test_a_task_is_committed_before_its_event_is_published(
    engine: Engine, clock: Clock
) -> None:
    queue = queue_of(engine, greet, now=clock)
    recorder = EventRecorder(queue)
    task = await promise(queue, greet, "Ada")
    assert await engine.get(task.id) == task
    assert [(event.type, event.task) for event in recorder.events] == [("queued", task)]


async def test_a_failed_commit_publishes_no_event(engine: Engine, clock: Clock) -> None:
    answer = Answer("key", "fingerprint", "{}", "/tasks/1", NOW)
    await engine.put(Writes(answer=answer))
    queue = queue_of(engine, greet, now=clock)
    recorder = EventRecorder(queue)
    durable_tasks = queue.collect()
    durable_tasks.add_task(greet, "Ada")
    with pytest.raises(KeyTaken):
        await queue.commit(durable_tasks.collected(answer))
    assert recorder.events == []


async def test_an_empty_unit_of_work_commits_nothing(clock: Clock) -> None:
    """The queue does not even call the engine."""
    engine = Mock(spec=Engine)
    queue = queue_of(engine, greet, now=clock)
    await queue.commit(queue.collect().collected())
    assert engine.method_calls == []


async def test_a_transaction_commits_at_the_end_of_its_block(engine: Engine, clock: Clock) -> None:
    queue = queue_of(engine, greet, now=clock)
    recorder = EventRecorder(queue)
    async with queue.transaction("request-1", "ada") as transaction:
        task = transaction.add_task(greet, "Ada")
        transaction.add_record("names", "1", {"name": "Ada"})
        assert recorder.events == []
    assert (task.request_id, task.client) == ("request-1", "ada")
    assert [(event.type, event.task) for event in recorder.events] == [("queued", task)]
    assert await engine.get(task.id) == task
    assert (await engine.read_record("names", "1", client="ada")).body == {"name": "Ada"}


async def test_a_transaction_whose_block_raises_writes_nothing(
    engine: Engine, clock: Clock
) -> None:
    queue = queue_of(engine, greet, now=clock)
    with contextlib.suppress(LookupError):
        async with queue.transaction() as transaction:
            task = transaction.add_task(greet, "Ada")
            raise LookupError
    with pytest.raises(TaskNotFound):
        await engine.get(task.id)


async def test_a_task_can_be_cancelled_and_then_retried(engine: Engine, clock: Clock) -> None:
    queue = queue_of(engine, greet, now=clock)
    recorder = EventRecorder(queue)
    task = await promise(queue, greet, "Ada")
    clock.now = NOW + 1
    cancelled = await queue.cancel(task.id)
    assert (cancelled.status, cancelled.finished_at) == (Status.CANCELLED, NOW + 1)
    clock.now = NOW + 2
    retried = await queue.retry(task)
    assert (retried.status, retried.due_at) == (Status.QUEUED, NOW + 2)
    assert [(event.type, event.task) for event in recorder.events] == [
        ("queued", task),
        ("cancelled", cancelled),
        ("queued", retried),
    ]


async def test_a_refused_cancellation_or_retry_publishes_no_event(
    engine: Engine, clock: Clock
) -> None:
    queue = queue_of(engine, greet, now=clock)
    await promise(queue, greet, "Ada")
    running = await claim_one(engine)
    recorder = EventRecorder(queue)
    with pytest.raises(TaskHasStarted, match="started or is finished"):
        await queue.cancel(running.id)
    with pytest.raises(TaskNotGivenUp, match="failed or a cancelled task"):
        await queue.retry(running)
    assert recorder.events == []
