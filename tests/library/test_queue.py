"""The queue: it writes each change to the database first, and then publishes its event."""

import asyncio
import contextlib
from unittest.mock import Mock

import pytest

from afterward import queue as queue_module
from afterward.backlog_limit import BacklogLimit
from afterward.bulk import Action
from afterward.engine import Engine
from afterward.errors import (
    BacklogFull,
    KeyTaken,
    TaskHasStarted,
    TaskNotFound,
    TaskNotGivenUp,
    TaskNotRetrying,
)
from afterward.filter import TaskFilter
from afterward.queue import Queue
from afterward.registry import Registry, TaskKind
from afterward.retry import RetryPolicy
from afterward.task import Answer, Outcome, Status, Task, Writes
from afterward.unit_of_work import Context
from tests.library.support import (
    NO_WAITS,
    NOW,
    Clock,
    EventRecorder,
    a_task,
    claim_one,
    promise,
    put,
    queue_of,
)

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


async def test_a_repeated_request_is_recognised_although_the_backlog_is_full(
    engine: Engine, clock: Clock
) -> None:
    """The first request has filled it. The repetition needs no place, and gets the first answer."""
    queue = Queue(engine, Registry[None](greet), NO_WAITS, max_backlog=1, now=clock)
    answer, other = (Answer(key, "f", "{}", "/tasks/1", NOW) for key in ("key", "other"))

    def writes(answer: Answer) -> Writes:
        durable_tasks = queue.collect()
        durable_tasks.add_task(greet, "Ada")
        return durable_tasks.collected(answer)

    first = writes(answer)
    await queue.commit(first)
    for again in (queue.commit(writes(answer)), queue.retry(first.tasks[0], answer)):
        with pytest.raises(KeyTaken) as taken:
            await again
        assert taken.value.answer == answer
    for new in (queue.commit(writes(other)), queue.retry(first.tasks[0], other)):
        with pytest.raises(BacklogFull):
            await new
    with pytest.raises(BacklogFull):
        await queue.retry(first.tasks[0])


@pytest.mark.parametrize(("maximum", "longest"), [(1.0, 30.0), (7200.0, 7200.0)])
def test_no_wait_is_longer_than_that_of_a_policy_or_of_a_pause(
    maximum: float, longest: float
) -> None:
    """A pause of a service that is away lasts for up to 30 s, for any policy."""
    kinds = Registry[None](TaskKind(greet, RetryPolicy(maximum=maximum)))
    assert Queue(Mock(spec=Engine), kinds, RetryPolicy(maximum=1.0)).longest_wait == longest


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


def test_only_the_beginning_of_a_long_request_id_is_stored(clock: Clock) -> None:
    queue = queue_of(Mock(spec=Engine), greet, now=clock)
    assert queue.collect("r" * 9000).add_task(greet, "Ada").request_id == "r" * 255
    assert queue.collect().add_task(greet, "Ada").request_id is None


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


async def test_a_retrying_task_can_be_run_now(engine: Engine, clock: Clock) -> None:
    queue = queue_of(engine, greet, now=clock)
    task = await promise(queue, greet, "Ada")
    recorder = EventRecorder(queue)
    with pytest.raises(TaskNotRetrying):
        await queue.run_now(task.id)
    await engine.settle(await claim_one(engine), Outcome(Status.RETRYING, due_at=NOW + 60), NOW)
    clock.now = NOW + 1
    due = await queue.run_now(task.id)
    assert (due.status, due.next_attempt_at) == (Status.RETRYING, NOW + 1)
    assert [(event.type, event.task) for event in recorder.events] == [("pulled_forward", due)]


# Bulk actions


RETRIES = TaskFilter(kind="greet").acted_on(Action.RETRY, NOW)
CANCELS = TaskFilter(kind="greet").acted_on(Action.CANCEL, NOW)


async def cancelled_tasks(engine: Engine, number: int) -> list[Task]:
    tasks = [a_task() for _ in range(number)]
    await put(engine, *tasks)
    return [await engine.cancel(task.id, NOW) for task in tasks]


async def an_action(engine: Engine) -> Task:
    await put(engine, a_task(kind="work", due_at=NOW - 1))
    return await claim_one(engine)


async def test_a_slice_publishes_an_event_for_each_task_the_oldest_first(
    engine: Engine, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queue_module, "EVENTS_AT_ONCE", 2)
    queue = queue_of(engine, greet, now=clock)
    tasks = await cancelled_tasks(engine, 5)
    action, recorder = await an_action(engine), EventRecorder(queue)
    for wanted, event_type in ((RETRIES, "queued"), (CANCELS, "cancelled")):
        piece = await queue.change_slice(action, wanted)
        assert piece is not None
        assert (len(piece.changed), piece.done) == (5, 5)
        assert [event.type.value for event in recorder.events] == [event_type] * 5
        assert [event.task.id for event in recorder.events] == [task.id for task in tasks]
        assert [event.task for event in recorder.events] == sorted(
            piece.changed, key=lambda task: task.id
        )
        recorder.events.clear()
        action = await an_action(engine)


async def test_other_work_runs_between_the_events_of_a_slice(
    engine: Engine, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queue_module, "EVENTS_AT_ONCE", 10)
    queue = queue_of(engine, greet, now=clock)
    await cancelled_tasks(engine, 40)
    action, recorder = await an_action(engine), EventRecorder(queue)
    seen: set[int] = set()

    async def watch() -> None:
        while len(recorder.events) < 40:
            seen.add(len(recorder.events))
            await asyncio.sleep(0)

    await asyncio.gather(queue.change_slice(action, RETRIES), watch())
    assert {0, 10, 20, 30} <= seen


async def test_a_retried_task_of_a_slice_gets_the_bounds_of_its_kind(
    engine: Engine, clock: Clock
) -> None:
    registry = Registry[None](TaskKind(greet, retry=RetryPolicy(give_up_after=60.0)))
    queue = Queue(engine, registry, NO_WAITS, now=clock)
    await cancelled_tasks(engine, 1)
    await put(engine, unknown := a_task(kind="retired"))
    await engine.cancel(unknown.id, NOW)
    wanted = TaskFilter().acted_on(Action.RETRY, NOW)
    clock.now = NOW + 1
    piece = await queue.change_slice(await an_action(engine), wanted)
    assert piece is not None
    assert {(task.kind, task.max_attempts, task.gives_up_at) for task in piece.changed} == {
        ("greet", None, NOW + 61),
        ("retired", NO_WAITS.attempts, None),
    }


async def test_a_slice_retries_only_as_many_tasks_as_the_backlog_takes(
    engine: Engine, clock: Clock
) -> None:
    """A cancellation needs no place in the backlog."""
    queue = Queue(engine, Registry[None](greet), NO_WAITS, max_backlog=4, now=clock)
    await cancelled_tasks(engine, 5)
    action = await an_action(engine)  # it is unfinished, so three places are left
    piece = await queue.change_slice(action, RETRIES)
    assert piece is not None
    assert (piece.done, piece.is_last) == (3, False)
    with pytest.raises(BacklogFull):
        await queue.change_slice(action, RETRIES)
    cancelled = await queue.change_slice(await an_action(engine), CANCELS)
    assert cancelled is not None
    assert len(cancelled.changed) == 3
    piece = await queue.change_slice(action, RETRIES)
    assert piece is not None
    assert (piece.done, piece.is_last) == (5, True)


async def test_a_slice_without_a_claim_publishes_nothing(engine: Engine, clock: Clock) -> None:
    queue = queue_of(engine, greet, now=clock)
    await cancelled_tasks(engine, 1)
    recorder = EventRecorder(queue)
    assert await queue.change_slice(a_task(), RETRIES) is None
    assert recorder.events == []
    assert await BacklogLimit(engine.backlog, 1).reserve_up_to(9) == 1


async def test_a_filter_without_an_action_changes_nothing(engine: Engine, clock: Clock) -> None:
    queue = queue_of(engine, greet, now=clock)
    with pytest.raises(ValueError, match="acted_on"):
        await queue.change_slice(await an_action(engine), TaskFilter())
