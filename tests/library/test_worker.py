"""The worker: it runs the tasks that are due, and writes how each of their attempts ended."""

import asyncio
import contextlib
import json
import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import replace
from typing import Any, cast

import anyio
import pytest
from structlog.testing import capture_logs

from afterward import heartbeat as heartbeat_module
from afterward import keep_trying as keep_trying_module
from afterward import worker as worker_module
from afterward.engine import Engine
from afterward.errors import (
    PermanentError,
    QueueUnavailable,
    ServiceUnavailable,
    TaskNotFound,
    TemporaryError,
)
from afterward.events import Event, EventType
from afterward.queue import Queue
from afterward.registry import Registry, TaskKind
from afterward.retry import RetryPolicy
from afterward.task import Claim, Outcome, Status, Task
from afterward.unit_of_work import Context
from afterward.worker import Worker
from tests.library.support import (
    DAY,
    LEASE,
    LONGEST_WAITS,
    NO_WAITS,
    NOW,
    Clock,
    EventRecorder,
    a_task,
    claim_all,
    claim_one,
    promise,
    put,
    queue_of,
    recover,
    wait_forever,
    working,
)

AN_HOUR = RetryPolicy(attempts=3, base=10.0, give_up_after=3600, uniform=lambda _, most: most)

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("frequent_polls")]


async def after_a_run(queue: Queue[None], task: Task, **settings: Any) -> Task:
    """Run a worker until no task is due, then read the task again."""
    await Worker(queue, None, **settings).run_until_idle()
    return await queue.engine.get(task.id)


def error_of(task: Task) -> dict[str, Any]:
    assert task.error is not None
    error: dict[str, Any] = json.loads(task.error)
    return error


# Success


async def test_a_task_gets_its_arguments_and_its_result_is_stored(
    engine: Engine, clock: Clock
) -> None:
    async def greet(context: Context[None], name: str, *, greeting: str) -> dict[str, str]:
        return {"said": f"{greeting} {name}"}

    queue = queue_of(engine, greet, now=clock)
    task = await after_a_run(queue, await promise(queue, greet, "Ada", greeting="Hello"))
    assert (task.status, task.result) == (Status.SUCCEEDED, '{"said":"Hello Ada"}')
    assert (task.attempts, task.finished_at, task.error) == (1, NOW, None)


async def test_a_task_that_returns_nothing_has_no_result(engine: Engine, clock: Clock) -> None:
    async def nothing(context: Context[None]) -> None:
        pass

    queue = queue_of(engine, nothing, now=clock)
    task = await after_a_run(queue, await promise(queue, nothing))
    assert (task.status, task.result) == (Status.SUCCEEDED, None)


async def test_a_task_s_context_has_the_task_and_the_tools(engine: Engine, clock: Clock) -> None:
    seen = []

    async def look(context: Context[str]) -> None:
        seen.append((context.task.id, context.task.attempts, context.tools))

    queue = Queue[str](engine, Registry(look), LONGEST_WAITS, now=clock)
    durable_tasks = queue.collect()
    task = durable_tasks.add_task(look)
    await queue.commit(durable_tasks.collected())
    await Worker(queue, "a hammer").run_until_idle()
    assert seen == [(task.id, 1, "a hammer")]


async def test_an_urgent_task_begins_before_those_that_wait(engine: Engine, clock: Clock) -> None:
    begun = []

    async def send(context: Context[None]) -> None:
        begun.append("send")

    async def cancel_all(context: Context[None]) -> None:
        begun.append("cancel_all")
        if begun.count("cancel_all") == 1:
            raise TemporaryError("once more")

    registry = Registry[None](send, TaskKind(cancel_all, urgent=True))
    queue = Queue(engine, registry, NO_WAITS, now=clock)
    await promise(queue, send)
    await promise(queue, send)
    clock.now += 1
    await promise(queue, cancel_all)
    await Worker(queue, None, concurrency=1).run_until_idle()
    assert begun == ["cancel_all", "cancel_all", "send", "send"]


async def test_a_task_fails_if_its_retry_policy_does(engine: Engine, clock: Clock) -> None:
    """Otherwise it would stay running until the process ends."""

    def fail(_: float, __: float) -> float:
        raise OSError("no random numbers")

    async def raise_an_error(_: Context[None]) -> None:
        raise ValueError("the task's own error")

    policy = replace(LONGEST_WAITS, uniform=fail)
    queue = queue_of(engine, raise_an_error, now=clock, policy=policy)
    with capture_logs() as lines:
        task = await after_a_run(queue, await promise(queue, raise_an_error))
    assert task.status is Status.FAILED
    assert error_of(task)["detail"] == "the task's own error"
    events = [line["event"] for line in lines if line["log_level"] == "error"]
    assert events == ["the retry policy fails, so the task fails"]


async def test_events_are_published_in_order(engine: Engine, clock: Clock) -> None:
    """Each event has the task in its state at that time; the last has the attempt's duration."""

    async def halve(context: Context[None]) -> None:
        await context.report_progress(0.5)

    queue = queue_of(engine, halve, now=clock)
    recorder = EventRecorder(queue)
    task = await after_a_run(queue, await promise(queue, halve))
    assert recorder.event_types == ["queued", "started", "progressed", "succeeded"]
    statuses = [event.task.status for event in recorder.events]
    assert statuses == ["queued", "running", "running", "succeeded"]
    *before, last = recorder.events
    assert {event.seconds for event in before} == {None}
    assert last.task == task
    assert (last.seconds or 0) > 0
    assert last.exception is None


async def test_follow_ups_are_committed_with_the_success(engine: Engine, clock: Clock) -> None:
    async def follow_up(context: Context[None]) -> str:
        return str(context.task.request_id)

    async def upload(context: Context[None]) -> None:
        context.durable_tasks.add_task(follow_up)
        context.durable_tasks.add_record("uploads", "1", {"size": 3})

    queue = queue_of(engine, upload, follow_up, now=clock)
    recorder = EventRecorder(queue)
    durable_tasks = queue.collect("request-1")
    durable_tasks.add_task(upload)
    await queue.commit(durable_tasks.collected())
    await Worker(queue, None).run_until_idle()
    assert recorder.event_types == [
        "queued",
        "started",
        "succeeded",
        "queued",
        "started",
        "succeeded",
    ]
    assert recorder.events[-1].task.result == '"request-1"'
    assert (await engine.read_record("uploads", "1", client="")).body == {"size": 3}


# Failure


async def test_a_failed_attempt_is_repeated_after_its_wait(engine: Engine, clock: Clock) -> None:
    async def fail_at_first(context: Context[None]) -> str:
        if context.task.attempts == 1:
            raise TemporaryError("mailbox busy", smtp_code=450, smtp_text=None)
        return "at last"

    queue = queue_of(engine, fail_at_first, now=clock, policy=LONGEST_WAITS)
    recorder = EventRecorder(queue)
    task = await after_a_run(queue, await promise(queue, fail_at_first))
    assert (task.status, task.attempts, task.next_attempt_at) == (Status.RETRYING, 1, NOW + 10)
    assert error_of(task) == {
        "type": "TemporaryError",
        "detail": "mailbox busy",
        "smtp_code": 450,
    }
    assert isinstance(recorder.events[-1].exception, TemporaryError)

    clock.now = NOW + 10
    task = await after_a_run(queue, task)
    assert (task.status, task.attempts, task.result) == (Status.SUCCEEDED, 2, '"at last"')
    assert (task.next_attempt_at, task.error) == (None, None)
    assert recorder.event_types == ["queued", "started", "retrying", "started", "succeeded"]


async def test_a_task_fails_when_its_attempts_run_out(engine: Engine, clock: Clock) -> None:
    async def fail(context: Context[None]) -> None:
        raise OSError("x" * 5000)

    queue = queue_of(engine, fail, now=clock)
    recorder = EventRecorder(queue)
    task = await after_a_run(queue, await promise(queue, fail))
    assert (task.status, task.attempts) == (Status.FAILED, 3)
    assert error_of(task) == {"type": "OSError", "detail": "x" * 1000}
    assert recorder.event_types == ["queued", *["started", "retrying"] * 2, "started", "failed"]


async def test_a_permanent_error_fails_a_task_at_once(engine: Engine, clock: Clock) -> None:
    """The facts of the error are stored with the task, for the client that reads it."""

    async def refuse(context: Context[None]) -> None:
        raise PermanentError("no such mailbox", smtp_code=550)

    queue = queue_of(engine, refuse, now=clock)
    task = await after_a_run(queue, await promise(queue, refuse))
    assert (task.status, task.attempts) == (Status.FAILED, 1)
    assert error_of(task) == {
        "type": "PermanentError",
        "detail": "no such mailbox",
        "smtp_code": 550,
    }


async def test_an_attempt_that_takes_too_long_is_stopped(engine: Engine, clock: Clock) -> None:
    queue = queue_of(engine, wait_forever, now=clock)
    task = await after_a_run(queue, await promise(queue, wait_forever), task_timeout=0.01)
    assert (task.status, task.attempts) == (Status.FAILED, 3)
    assert error_of(task) == {
        "type": "TimeoutError",
        "detail": "the attempt took longer than 0.01 s",
    }


async def test_a_timeout_error_of_the_task_itself_keeps_its_message(
    engine: Engine, clock: Clock
) -> None:
    async def connect(context: Context[None]) -> None:
        raise TimeoutError("the server did not answer")

    queue = queue_of(engine, connect, now=clock)
    task = await after_a_run(queue, await promise(queue, connect))
    assert error_of(task)["detail"] == "the server did not answer"


async def test_a_task_of_an_unknown_kind_waits_for_a_worker_that_knows_it(
    engine: Engine, clock: Clock
) -> None:
    """During a rolling upgrade, an old worker must not fail a task that a new worker can run."""
    await put(engine, task := a_task(kind="renamed"))
    assert await after_a_run(queue_of(engine, now=clock), task) == task


async def test_a_task_with_a_result_that_is_not_json_fails_without_a_second_run(
    engine: Engine, clock: Clock
) -> None:
    ran = []

    async def careless(context: Context[None]) -> object:
        ran.append(context.task.id)
        return object()

    queue = queue_of(engine, careless, now=clock)
    task = await after_a_run(queue, await promise(queue, careless))
    assert (task.status, ran) == (Status.FAILED, [task.id])
    assert error_of(task)["type"] == "UnusableResult"
    assert "the work was done" in error_of(task)["detail"]


@pytest.mark.parametrize("where", ["record", "follow-up"])
async def test_a_record_or_a_follow_up_that_is_not_json_fails_the_task(
    engine: Engine, clock: Clock, where: str
) -> None:
    """The worker goes on."""

    async def careless(context: Context[None], value: Any = None) -> None:
        if where == "record":
            context.durable_tasks.add_record("uploads", "1", {"value": object()})
        if where == "follow-up":
            context.durable_tasks.add_task(careless, object())

    queue = queue_of(engine, careless, now=clock)
    task = await after_a_run(queue, await promise(queue, careless))
    assert task.status is Status.FAILED
    assert error_of(task)["type"] == "TypeError"


async def test_arguments_that_cannot_be_read_fail_only_their_own_task(
    engine: Engine, clock: Clock
) -> None:
    async def greet(context: Context[None]) -> None:
        pass

    queue = queue_of(engine, greet, now=clock)
    await put(engine, broken := a_task(arguments='{"args":[]}'))
    task = await after_a_run(queue, await promise(queue, greet))
    assert task.status is Status.SUCCEEDED
    broken = await engine.get(broken.id)
    assert (broken.status, broken.attempts) == (Status.FAILED, 1)
    assert "arguments cannot be read" in error_of(broken)["detail"]


class Odd(Exception):
    """An error whose description cannot be read."""

    def __str__(self) -> str:
        """Raise a TypeError, because the argument is a string and no dict."""
        return str(self.args[0]["detail"])


@pytest.mark.parametrize(
    "error",
    [
        Odd("no document"),
        TemporaryError("busy", payload=b"bytes"),  # type: ignore[arg-type]
        BaseExceptionGroup("two", [OSError(), KeyboardInterrupt()]),
        OSError("a\udcffb\0c"),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_an_attempt_is_settled_after_an_error_of_any_shape(
    engine: Engine, clock: Clock, error: BaseException
) -> None:
    async def fail(context: Context[None]) -> None:
        raise error

    queue = queue_of(engine, fail, now=clock)
    task = await after_a_run(queue, await promise(queue, fail))
    assert (task.status, task.attempts) == (Status.FAILED, 3)
    assert error_of(task)["type"] == type(error).__name__


async def test_a_subscriber_that_raises_harms_neither_the_task_nor_other_subscribers(
    engine: Engine, clock: Clock
) -> None:
    async def greet(context: Context[None]) -> None:
        pass

    def careless(event: Event) -> None:
        raise LookupError(event.type)

    queue = queue_of(engine, greet, now=clock)
    queue.events.subscribe(careless)
    recorder = EventRecorder(queue)
    task = await after_a_run(queue, await promise(queue, greet))
    assert task.status is Status.SUCCEEDED
    assert recorder.event_types == ["queued", "started", "succeeded"]


async def test_an_outcome_that_can_never_be_written_fails_the_task(
    engine: Engine, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the worker would try to write it, and hold the task, until the process ends."""
    monkeypatch.setattr(keep_trying_module, "FIRST_PAUSE_SECONDS", 0.001)

    async def careless(context: Context[None]) -> None:
        context.durable_tasks.add_record("uploads", "1", body := {"size": 3})
        body["size"] = object()  # type: ignore[assignment]

    queue = queue_of(engine, careless, now=clock)
    recorder = EventRecorder(queue)
    task = await after_a_run(queue, await promise(queue, careless))
    assert (task.status, task.attempts) == (Status.FAILED, 1)
    assert error_of(task)["type"] == "OutcomeNotWritten"
    assert recorder.event_types == ["queued", "started", "failed"]


# Bounds by time


async def test_temporary_errors_are_retried_until_the_time_of_the_task_is_over(
    engine: Engine, clock: Clock
) -> None:
    """Then the task fails, with its last error."""

    async def greylisted(context: Context[None]) -> None:
        raise TemporaryError("greylisted", smtp_code=451)

    queue = queue_of(engine, greylisted, now=clock, policy=AN_HOUR)
    task = await promise(queue, greylisted)
    assert (task.max_attempts, task.gives_up_at) == (None, NOW + 3600)
    while (task := await after_a_run(queue, task)).status is Status.RETRYING:
        assert clock.now < task.due_at <= NOW + 3600
        clock.now = task.due_at
    assert (task.status, task.finished_at) == (Status.FAILED, NOW + 3600)
    assert (task.attempts, task.errors) == (11, 0)
    assert error_of(task)["smtp_code"] == 451

    clock.now = NOW + DAY
    task = await queue.retry(task)
    assert (task.status, task.attempts, task.gives_up_at) == (
        Status.QUEUED,
        0,
        NOW + DAY + 3600,
    )


async def test_a_kind_may_wait_longer_than_the_policy_of_the_queue(
    engine: Engine, clock: Clock
) -> None:
    """The heartbeat pulls no retry forward that a policy has given such a wait."""

    async def fail(context: Context[None]) -> None:
        raise TemporaryError("busy")

    an_hour = RetryPolicy(base=3600.0, maximum=3600.0, uniform=lambda _, longest: longest)
    queue: Queue[None] = Queue(
        engine, Registry(TaskKind(fail, retry=an_hour)), RetryPolicy(maximum=60.0), now=clock
    )
    recorder = EventRecorder(queue)
    await promise(queue, fail)
    async with working(queue, lease=0.03):
        retrying = await recorder.until(EventType.RETRYING)
        await asyncio.sleep(0.1)
        assert await engine.get(retrying.task.id) == retrying.task
    assert retrying.task.due_at == NOW + 3600


async def test_unexpected_errors_are_retried_a_few_times_only(engine: Engine, clock: Clock) -> None:
    """Temporary errors between them do not count."""
    errors = iter([OSError(), TemporaryError("busy"), OSError(), TemporaryError("busy"), OSError()])

    async def fail(context: Context[None]) -> None:
        raise next(errors)

    queue = queue_of(engine, fail, now=clock, policy=replace(AN_HOUR, base=0.0))
    task = await after_a_run(queue, await promise(queue, fail))
    assert (task.status, task.attempts, task.errors) == (Status.FAILED, 5, 3)


@pytest.mark.parametrize("error", [asyncio.CancelledError, SystemExit, KeyboardInterrupt])
async def test_no_exception_of_a_task_stops_the_worker(
    engine: Engine, clock: Clock, error: type[BaseException]
) -> None:
    """Even a BaseException does not. Such an attempt counts, or it would be repeated for ever."""

    async def wild(context: Context[None]) -> None:
        raise error

    queue = queue_of(engine, wild, now=clock)
    first, second = await promise(queue, wild), await promise(queue, wild)
    await Worker(queue, None, concurrency=1).run_until_idle()
    for task in (await engine.get(first.id), await engine.get(second.id)):
        assert (task.status, task.attempts) == (Status.FAILED, 3)
        assert error_of(task)["type"] == error.__name__


async def await_after_cancelling() -> None:
    cast("asyncio.Task[None]", asyncio.current_task()).cancel()
    await asyncio.sleep(60)


async def return_after_cancelling() -> None:
    cast("asyncio.Task[None]", asyncio.current_task()).cancel()


async def leave_a_cancelled_scope_open() -> None:
    """Anyio cancels the asyncio task again and again, as long as it is within the scope."""
    scope = anyio.CancelScope()
    scope.__enter__()
    scope.cancel()
    await asyncio.sleep(60)


@pytest.mark.parametrize(
    ("cancel", "ended_as"),
    [
        (await_after_cancelling, "failed"),
        (return_after_cancelling, "succeeded"),
        (leave_a_cancelled_scope_open, "failed"),
    ],
)
async def test_an_attempt_that_cancels_itself_counts(
    engine: Engine, clock: Clock, cancel: Callable[[], Awaitable[None]], ended_as: str
) -> None:
    """Otherwise the task would run again for ever. Its outcome is written nevertheless."""

    async def cancel_itself(_: Context[None]) -> None:
        await cancel()

    queue = queue_of(engine, cancel_itself, now=clock, policy=replace(NO_WAITS, attempts=2))
    recorder = EventRecorder(queue)
    task = await promise(queue, cancel_itself)
    async with working(queue):
        ended = await recorder.until(EventType(ended_as))
    assert ended.task == await engine.get(task.id)
    assert ended.task.attempts == (2 if ended_as == "failed" else 1)


async def test_follow_ups_of_a_failed_attempt_are_dropped(engine: Engine, clock: Clock) -> None:
    """The next attempt adds them again."""
    added = []

    async def fail_late(context: Context[None]) -> None:
        added.append(context.durable_tasks.add_task(wait_forever))
        raise OSError

    queue = queue_of(engine, fail_late, wait_forever, now=clock)
    await after_a_run(queue, await promise(queue, fail_late))
    assert len(added) == 3
    for task in added:
        with pytest.raises(TaskNotFound):
            await engine.get(task.id)


# Progress


@pytest.mark.parametrize(("told", "noted"), [(0.25, 0.25), (-1, 0), (7, 1)])
async def test_progress_is_clamped_to_0_and_1(
    engine: Engine, clock: Clock, told: float, noted: float
) -> None:
    async def tell(context: Context[None]) -> None:
        await context.report_progress(told)

    queue = queue_of(engine, tell, now=clock)
    task = await after_a_run(queue, await promise(queue, tell))
    assert task.progress == noted


async def test_progress_that_is_no_number_is_refused(engine: Engine, clock: Clock) -> None:
    """No JSON has NaN, so no client could read the task."""

    async def tell(context: Context[None]) -> None:
        await context.report_progress(float("nan"))

    queue = queue_of(engine, tell, now=clock)
    task = await after_a_run(queue, await promise(queue, tell))
    assert (task.status, task.progress) == (Status.FAILED, None)
    assert error_of(task)["detail"] == "progress must be a number from 0 to 1, and it is NaN"


async def test_progress_that_cannot_be_written_is_dropped(engine: Engine, clock: Clock) -> None:
    async def tell(context: Context[None]) -> None:
        await context.report_progress(0.5)

    queue = queue_of(refusing(engine, "report"), tell, now=clock)
    task = await after_a_run(queue, await promise(queue, tell))
    assert (task.status, task.progress) == (Status.SUCCEEDED, None)


# Running


async def test_no_more_tasks_run_at_once_than_allowed(engine: Engine, clock: Clock) -> None:
    running = most = 0

    async def count(context: Context[None]) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.005)
        running -= 1

    queue = queue_of(engine, count, now=clock)
    recorder = EventRecorder(queue)
    for _ in range(20):
        await promise(queue, count)
    async with working(queue, concurrency=3):
        await recorder.until(EventType.SUCCEEDED, times=20)
    assert most == 3


async def test_a_slot_runs_its_next_task_only_after_the_last_outcome_is_on_disk(
    engine: Engine, clock: Clock
) -> None:
    """The next task is claimed before, but waits.

    If it began at once, a crash could repeat more tasks than the worker has slots: the tasks that
    run, and the tasks that have run but have no outcome on disk.
    """
    begun = []
    disk_is_slow = asyncio.Event()

    async def run(context: Context[None], name: str) -> None:
        begun.append(name)
        if name == "long":
            await asyncio.Event().wait()

    class Slow:
        """The engine with a slow disk: it takes long to settle the first task."""

        def __getattr__(self, verb: str) -> Any:
            return getattr(engine, verb)

        async def settle(self, task: Task, *outcome: Any) -> Task | None:
            if task.id == first.id:
                await disk_is_slow.wait()
            return await engine.settle(task, *outcome)

    queue = queue_of(cast(Engine, Slow()), run, now=clock)
    recorder = EventRecorder(queue)
    first, _, _, last = [
        await promise(queue, run, name) for name in ("slow", "quick", "long", "last")
    ]
    async with working(queue, concurrency=2):
        await recorder.until(EventType.STARTED, times=3)
        await asyncio.sleep(0.05)
        assert begun == ["slow", "quick", "long"]
        assert (await engine.get(last.id)).status is Status.RUNNING
        disk_is_slow.set()
        await recorder.until(EventType.STARTED, times=4)
    assert begun == ["slow", "quick", "long", "last"]


async def test_a_worker_is_busy_while_tasks_come_and_go(
    engine: Engine, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker with a task that only waits is not busy: it takes no time from requests."""
    queue = queue_of(engine, wait_forever, now=clock)
    recorder = EventRecorder(queue)
    async with working(queue) as worker:
        was_busy = [worker.is_busy]
        await promise(queue, wait_forever)
        await recorder.until(EventType.STARTED)
        monkeypatch.setattr(worker_module, "QUIET_SECONDS", 60)
        was_busy.append(worker.is_busy)
        monkeypatch.setattr(worker_module, "QUIET_SECONDS", 0)
        was_busy.append(worker.is_busy)
    assert was_busy == [False, True, False]


async def test_two_workers_run_each_task_once(engine: Engine, clock: Clock) -> None:
    ran = []

    async def run(context: Context[None]) -> None:
        ran.append(context.task.id)
        await asyncio.sleep(0.001)

    queue = queue_of(engine, run, now=clock)
    recorder = EventRecorder(queue)
    tasks = [await promise(queue, run) for _ in range(50)]
    async with working(queue, concurrency=3), working(queue, concurrency=3):
        await recorder.until(EventType.SUCCEEDED, times=50)
    assert sorted(ran) == sorted(task.id for task in tasks)


async def test_an_idle_worker_starts_a_new_task_at_once(
    engine: Engine, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The commit of the task wakes the worker, long before the next poll."""
    monkeypatch.setattr(worker_module, "POLL_SECONDS", 600.0)

    async def greet(context: Context[None]) -> None:
        pass

    queue = queue_of(engine, greet, now=clock)
    recorder = EventRecorder(queue)
    async with working(queue):
        await asyncio.sleep(0.05)
        await promise(queue, greet)
        await recorder.until(EventType.SUCCEEDED)  # long before the next poll


async def test_a_worker_notices_by_itself_that_a_retry_is_due(engine: Engine) -> None:
    async def fail_at_first(context: Context[None]) -> None:
        if context.task.attempts == 1:
            raise OSError

    queue = queue_of(engine, fail_at_first, now=time.time)
    recorder = EventRecorder(queue)
    async with working(queue):
        await promise(queue, fail_at_first)
        await recorder.until(EventType.SUCCEEDED)


# Leases


async def take_over(engine: Engine) -> Task:
    """Let another worker re-queue the task, whose lease has expired by its clock, and claim it."""
    now = NOW + LEASE + 1
    await recover(engine, "another worker", now=now)
    return await claim_one(engine, "another worker", now=now)


async def test_an_attempt_is_cancelled_when_its_task_was_claimed_elsewhere(
    engine: Engine, clock: Clock
) -> None:
    """The next heartbeat cancels it; its outcome changes nothing in the task's row."""
    queue = queue_of(engine, wait_forever, now=clock)
    recorder = EventRecorder(queue)
    await promise(queue, wait_forever)
    async with working(queue, concurrency=1, lease=0.15):
        await recorder.until(EventType.STARTED)
        taken = await take_over(engine)
        lost = await recorder.until(EventType.LOST)
    assert isinstance(lost.exception, asyncio.CancelledError)
    assert await engine.get(taken.id) == taken


async def test_an_attempt_writes_nothing_after_its_task_was_claimed_elsewhere(
    engine: Engine, clock: Clock
) -> None:
    """Neither its progress, nor its success, nor its follow-ups are written."""

    async def lose(context: Context[None]) -> None:
        await take_over(engine)
        await context.report_progress(0.5)
        context.durable_tasks.add_task(lose)

    queue = queue_of(engine, lose, now=clock)
    recorder = EventRecorder(queue)
    task = await after_a_run(queue, await promise(queue, lose))
    assert recorder.event_types == ["queued", "started", "lost"]
    assert (task.status, task.owner, task.progress) == (Status.RUNNING, "another worker", None)


async def test_two_attempts_of_a_task_never_run_at_once_in_one_worker(
    engine: Engine, clock: Clock
) -> None:
    """When a worker loses a task and claims it again, the earlier attempt ends before the next."""
    running = 0

    async def only_one(context: Context[None]) -> None:
        nonlocal running
        running += 1
        assert running == 1
        try:
            await asyncio.sleep(60 if context.task.attempts == 1 else 0)
        finally:
            running -= 1

    queue = queue_of(engine, only_one, now=clock)
    recorder = EventRecorder(queue)
    await promise(queue, only_one)
    async with working(queue):
        await recorder.until(EventType.STARTED)
        await recover(engine, "another worker", now=NOW + LEASE)
        clock.now = NOW + LEASE
        await recorder.until(EventType.SUCCEEDED)
    assert recorder.event_types == ["queued", "started", "lost", "started", "succeeded"]


async def test_a_worker_waits_for_an_earlier_attempt_that_ends_slowly(
    engine: Engine, clock: Clock
) -> None:
    """The earlier attempt cleans up for longer than LAST_STEP_SECONDS; then the next one runs."""
    steps = []
    cleaned = asyncio.Event()

    async def slow_to_end(context: Context[None]) -> None:
        steps.append(f"begins {context.task.attempts}")
        if context.task.attempts == 1:
            try:
                await asyncio.Event().wait()
            finally:
                await cleaned.wait()
                steps.append("ends 1")

    queue = queue_of(engine, slow_to_end, now=clock)
    recorder = EventRecorder(queue)
    task = await promise(queue, slow_to_end)
    async with working(queue):
        await recorder.until(EventType.STARTED)
        await recover(engine, "another worker", now=NOW + LEASE)
        clock.now = NOW + LEASE
        while (await engine.get(task.id)).status is not Status.RUNNING:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
        await asyncio.sleep(worker_module.LAST_STEP_SECONDS + 0.1)
        cleaned.set()
        await recorder.until(EventType.SUCCEEDED)
    assert steps == ["begins 1", "ends 1", "begins 2"]
    assert recorder.event_types == ["queued", "started", "lost", "started", "succeeded"]


async def test_an_attempt_fails_in_time_if_an_earlier_attempt_never_ends(
    engine: Engine, clock: Clock
) -> None:
    stuck = asyncio.Event()

    async def never_ends(context: Context[None]) -> None:
        while context.task.attempts == 1 and not stuck.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await stuck.wait()

    queue = queue_of(engine, never_ends, now=clock, policy=LONGEST_WAITS)
    recorder = EventRecorder(queue)
    await promise(queue, never_ends)
    async with working(queue) as worker:
        await recorder.until(EventType.STARTED)
        await recover(engine, "another worker", now=NOW + LEASE)
        worker._task_timeout = 0.05
        clock.now = NOW + LEASE
        retrying = await recorder.until(EventType.RETRYING)
        stuck.set()
    assert error_of(retrying.task)["detail"] == "an earlier attempt of this task does not end"


async def test_a_heartbeat_cancels_an_attempt_of_an_older_claim(
    engine: Engine, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker lost the task and claimed it again, so this attempt's claim is over."""
    queue = queue_of(engine, wait_forever, now=clock)
    recorder = EventRecorder(queue)
    task = await promise(queue, wait_forever)

    async def extend(*_: object, **__: object) -> set[tuple[str, int]]:
        return {(task.id, 2)}

    monkeypatch.setattr(engine, "extend", extend)
    async with working(queue, lease=0.15):
        given_back = await recorder.until(EventType.GIVEN_BACK)
    assert isinstance(given_back.exception, asyncio.CancelledError)


async def test_a_starting_worker_requeues_crashed_tasks(engine: Engine, clock: Clock) -> None:
    """Events are published for both: tasks that run again, and tasks that crashed too often."""

    async def survive(context: Context[None]) -> None:
        pass

    queue = queue_of(engine, survive, now=clock)
    recorder = EventRecorder(queue)
    await promise(queue, survive)
    await put(engine, deadly := a_task(max_attempts=1, kind="survive"))
    await claim_all(engine, "a dead worker")
    clock.now = NOW + LEASE
    async with working(queue):
        await recorder.until(EventType.SUCCEEDED)
    assert sorted(recorder.event_types[1:3]) == ["failed", "recovered"]
    assert error_of(await engine.get(deadly.id))["type"] == "WorkerDied"


async def test_a_running_worker_requeues_tasks_that_crash_later(
    engine: Engine, clock: Clock
) -> None:
    async def survive(context: Context[None]) -> None:
        pass

    queue = queue_of(engine, survive, now=clock)
    recorder = EventRecorder(queue)
    await promise(queue, survive)
    await claim_one(engine, "a worker that lives")
    async with working(queue, lease=0.15):
        await asyncio.sleep(0.1)
        clock.now = NOW + LEASE
        await recorder.until(EventType.SUCCEEDED)
    assert recorder.event_types == ["queued", "recovered", "started", "succeeded"]
    crashes = [event.task.crashes for event in recorder.events]
    assert crashes == [0, 1, 1, 0], "crashes in a row"


async def test_crashed_tasks_run_again_one_after_the_other(
    engine: Engine, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of them may have killed the worker. If they ran together, all would crash again.

    When one has ended, the next begins at once, and not at the next poll.
    """
    monkeypatch.setattr(worker_module, "POLL_SECONDS", 60)
    suspects = fresh = most = 0

    async def run(context: Context[None]) -> None:
        nonlocal suspects, fresh, most
        if context.task.crashes:
            suspects += 1
            most = max(most, suspects)
            await asyncio.sleep(0.01)
            suspects -= 1
        else:
            fresh += 1

    queue = queue_of(engine, run, now=clock)
    recorder = EventRecorder(queue)
    tasks = [await promise(queue, run) for _ in range(5)]
    await claim_all(engine, "a dead worker")
    clock.now = NOW + LEASE
    tasks += [await promise(queue, run) for _ in range(5)]
    async with working(queue, concurrency=20):
        await recorder.until(EventType.SUCCEEDED, times=len(tasks))
    assert (most, fresh) == (1, 5)
    for task in tasks[:5]:
        done = await engine.get(task.id)
        assert (done.attempts, done.error) == (2, None)


async def test_a_late_result_is_published_as_lost(engine: Engine, clock: Clock) -> None:
    """The heartbeat does not cancel an attempt that has run, and only has to write its outcome."""
    database = refusing(engine)

    async def send(context: Context[None]) -> None:
        database.refused.add("settle")

    queue = queue_of(database, send, now=clock)
    recorder = EventRecorder(queue)
    await promise(queue, send)
    async with working(queue, concurrency=1, lease=0.15):
        await recorder.until(EventType.STARTED)
        await take_over(engine)
        await asyncio.sleep(0.2)
        database.refused.clear()
        lost = await recorder.until(EventType.LOST)
    assert lost.exception is None


# Stopping


async def test_a_stopping_worker_lets_tasks_finish_within_the_grace_period(
    engine: Engine, clock: Clock
) -> None:
    """It starts no other task."""
    release = asyncio.Event()

    async def finish(context: Context[None]) -> None:
        await release.wait()

    queue = queue_of(engine, finish, now=clock)
    recorder = EventRecorder(queue)
    first, second = await promise(queue, finish), await promise(queue, finish)
    worker = Worker(queue, None, concurrency=1)
    await worker.start()
    await recorder.until(EventType.STARTED)
    stopping = asyncio.create_task(worker.stop(grace=5))
    await asyncio.sleep(0.05)
    release.set()
    await asyncio.wait_for(stopping, 1)
    assert (await engine.get(first.id)).status is Status.SUCCEEDED
    assert await engine.get(second.id) == second


async def test_an_idle_worker_stops_at_once(
    engine: Engine, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_module, "POLL_SECONDS", 60.0)
    async with working(queue_of(engine, now=clock)) as worker:
        await asyncio.sleep(0.05)
        async with asyncio.timeout(worker_module.LAST_STEP_SECONDS / 2):
            await worker.stop(grace=60)


async def test_a_worker_starts_once(engine: Engine, clock: Clock) -> None:
    """After its stop it would claim nothing, so the error comes at the second start."""
    async with working(queue_of(engine, now=clock)) as worker:
        pass
    with pytest.raises(RuntimeError, match="this worker was started before: make a new one"):
        await worker.start()


async def test_a_task_that_a_stopping_worker_has_just_claimed_runs(
    engine: Engine, clock: Clock
) -> None:
    async def greet(context: Context[None]) -> None:
        pass

    queue = queue_of(engine, greet, now=clock)
    task = await promise(queue, greet)
    worker = Worker(queue, None)
    await worker.start()
    await asyncio.sleep(0)  # the claim is under way
    await worker.stop(grace=5)
    assert (await engine.get(task.id)).status is Status.SUCCEEDED


@pytest.mark.parametrize("grace", [2, 0])
@pytest.mark.thorough
async def test_a_stop_waits_for_the_claim_under_way(
    engine: Engine, clock: Clock, monkeypatch: pytest.MonkeyPatch, grace: float
) -> None:
    """Its tasks run within the grace period, or are given back without a counted attempt."""
    committed = asyncio.Event()
    claim = engine.claim

    async def claim_slowly(*arguments: Any, **settings: Any) -> Claim:
        claimed = await claim(*arguments, **settings)
        await committed.wait()
        return claimed

    monkeypatch.setattr(engine, "claim", claim_slowly)
    monkeypatch.setattr(worker_module, "LAST_STEP_SECONDS", 0.2 if grace else 30)
    queue = queue_of(engine, wait_forever, now=clock)
    task = await promise(queue, wait_forever)
    worker = Worker(queue, None)
    await worker.start()
    while (await engine.get(task.id)).status is not Status.RUNNING:  # noqa: ASYNC110
        await asyncio.sleep(0.005)
    stopping = asyncio.create_task(worker.stop(grace=grace))
    await asyncio.sleep(0.5)
    committed.set()
    await stopping
    task = await engine.get(task.id)
    assert (task.status, task.attempts, task.crashes) == (Status.QUEUED, 0, 0)


async def test_the_tasks_of_a_claim_that_outlasts_the_grace_period_are_given_back(
    engine: Engine, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If they stayed claimed, each would wait for the end of its lease, and count as crashed."""
    monkeypatch.setattr(worker_module, "LAST_STEP_SECONDS", 0.05)
    answered = asyncio.Event()
    claim = engine.claim

    async def claim_slowly(*arguments: Any, **settings: Any) -> Claim:
        claimed = await claim(*arguments, **settings)
        await answered.wait()
        return claimed

    queue = queue_of(engine, wait_forever, now=clock, policy=replace(NO_WAITS, attempts=1))
    await put(engine, a_task(kind="wait_forever"))
    await claim_one(engine, "a dead worker")
    clock.now = NOW + LEASE
    task, lost = await promise(queue, wait_forever), await promise(queue, wait_forever)
    recorder = EventRecorder(queue)
    monkeypatch.setattr(engine, "claim", claim_slowly)
    worker = Worker(queue, None)
    await worker.start()
    while (await engine.get(task.id)).status is not Status.RUNNING:  # noqa: ASYNC110
        await asyncio.sleep(0.005)
    await worker.stop(grace=0)
    await engine.settle(await engine.get(lost.id), Outcome(Status.SUCCEEDED), NOW)
    answered.set()
    await recorder.until(EventType.GIVEN_BACK)
    assert recorder.event_types == ["recovered", "given_back"]
    task = await engine.get(task.id)
    assert (task.status, task.attempts, task.crashes) == (Status.QUEUED, 0, 0)


async def test_a_claim_that_the_database_answers_after_the_stop_of_the_engine_expires(
    engine: Engine, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its tasks cannot be given back any more, so another worker re-queues them."""
    monkeypatch.setattr(worker_module, "LAST_STEP_SECONDS", 0.05)
    database = refusing(engine)
    answered = asyncio.Event()

    async def claim_slowly(*arguments: Any, **settings: Any) -> Claim:
        claimed = await engine.claim(*arguments, **settings)
        await answered.wait()
        return claimed

    monkeypatch.setattr(database, "claim", claim_slowly, raising=False)
    queue = queue_of(database, wait_forever, now=clock)
    task = await promise(queue, wait_forever)
    worker = Worker(queue, None)
    await worker.start()
    while (await engine.get(task.id)).status is not Status.RUNNING:  # noqa: ASYNC110
        await asyncio.sleep(0.005)
    await worker.stop(grace=0)
    database.refused.add("settle")
    answered.set()
    await asyncio.wait(worker._loops, timeout=5)
    assert all(loop.cancelled() for loop in worker._loops)
    (recovered,) = await recover(engine, "worker-2", now=NOW + LEASE)
    assert recovered.id == task.id


async def test_a_worker_claims_no_more_once_its_stop_has_begun(
    engine: Engine, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A look at several paused kinds is several claims, and each may be slow."""
    claims = []

    async def claim_and_stop(*_: object, kinds: list[str], **__: object) -> Claim:
        claims.append(kinds)
        worker._stopping.set()
        return Claim()

    monkeypatch.setattr(engine, "claim", claim_and_stop)
    worker = Worker(queue_of(engine, wait_forever, now=clock), None)
    monkeypatch.setattr(worker._pauses, "kinds", lambda _: ["wait_forever", "wait_forever"])
    await worker.run_until_idle()
    assert claims == [["wait_forever"]]


async def test_nothing_of_a_worker_goes_on_if_its_stop_is_cancelled(
    engine: Engine, clock: Clock
) -> None:
    queue = queue_of(engine, wait_forever, now=clock)
    recorder = EventRecorder(queue)
    await promise(queue, wait_forever)
    worker = Worker(queue, None)
    await worker.start()
    await recorder.until(EventType.STARTED)
    stopping = asyncio.create_task(worker.stop(grace=60))
    await asyncio.sleep(0.05)
    stopping.cancel()
    await recorder.until(EventType.GIVEN_BACK)
    await asyncio.wait([*worker._loops, stopping], timeout=5)
    assert stopping.cancelled()
    assert all(loop.done() for loop in worker._loops)


async def test_tasks_are_given_back_if_the_whole_program_is_cancelled(
    engine: Engine, clock: Clock
) -> None:
    """At a second Ctrl-C, asyncio.run cancels all asyncio tasks, and nobody calls `stop`."""
    queue = queue_of(engine, wait_forever, now=clock)
    recorder = EventRecorder(queue)
    task = await promise(queue, wait_forever)
    worker = Worker(queue, None)
    await worker.start()
    await recorder.until(EventType.STARTED)
    for running in (*worker._loops, *worker._asyncio_tasks()):
        running.cancel()
    await recorder.until(EventType.GIVEN_BACK)
    await asyncio.wait(worker._loops, timeout=5)
    task = await engine.get(task.id)
    assert (task.status, task.attempts) == (Status.QUEUED, 0)


async def test_an_attempt_that_cancels_itself_during_the_grace_has_the_grace_to_settle(
    engine: Engine, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_module, "LAST_STEP_SECONDS", 0.01)
    settle, stopping = engine.settle, asyncio.Event()

    async def settle_slowly(*arguments: Any) -> Task | None:
        await asyncio.sleep(0.3)
        return await settle(*arguments)

    async def return_after_cancelling_itself(_: Context[None]) -> None:
        await stopping.wait()
        await return_after_cancelling()

    monkeypatch.setattr(engine, "settle", settle_slowly)
    queue = queue_of(engine, return_after_cancelling_itself, now=clock)
    recorder = EventRecorder(queue)
    task = await promise(queue, return_after_cancelling_itself)
    worker = Worker(queue, None)
    await worker.start()
    await recorder.until(EventType.STARTED)
    ending = asyncio.create_task(worker.stop(grace=30))
    await asyncio.sleep(0.05)
    stopping.set()
    await ending
    assert (await engine.get(task.id)).status is Status.SUCCEEDED


async def test_a_task_that_turns_its_cancellation_into_an_error_is_given_back_at_the_stop(
    engine: Engine, clock: Clock
) -> None:
    """The error counts neither as an attempt nor as a bug, because the stop caused it."""

    async def hide(context: Context[None]) -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            raise OSError from None

    queue = queue_of(engine, hide, now=clock)
    recorder = EventRecorder(queue)
    task = await promise(queue, hide)
    async with working(queue):
        await recorder.until(EventType.STARTED)
    task = await engine.get(task.id)
    assert (task.status, task.attempts, task.errors) == (Status.QUEUED, 0, 0)


async def hide_the_cancellation(_: Context[None]) -> None:
    try:
        await asyncio.Event().wait()
    except asyncio.CancelledError:
        raise TemporaryError("the mail may have been sent") from None


@pytest.mark.parametrize("function", [wait_forever, hide_the_cancellation])
async def test_a_task_with_one_attempt_does_not_run_again_after_a_stop(
    engine: Engine, clock: Clock, function: Callable[[Context[None]], Coroutine[Any, Any, None]]
) -> None:
    """Its work may be done: a mail may have been sent. So the attempt counts, as after a crash."""
    queue = queue_of(engine, function, now=clock, policy=replace(NO_WAITS, attempts=1))
    recorder = EventRecorder(queue)
    task = await promise(queue, function)
    async with working(queue):
        await recorder.until(EventType.STARTED)
    task = await engine.get(task.id)
    assert (task.status, task.attempts, task.errors) == (Status.FAILED, 1, 0)
    assert error_of(task)["type"] == "WorkerStopped"
    assert recorder.event_types == ["queued", "started", "failed"]


async def test_a_task_with_one_attempt_is_given_back_if_its_function_was_not_called(
    engine: Engine, clock: Clock
) -> None:
    """A person has retried it, but an earlier attempt of it still runs on the same worker."""

    async def slow_to_end(_: Context[None]) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.Event().wait()

    queue = queue_of(engine, slow_to_end, now=clock, policy=replace(NO_WAITS, attempts=1))
    recorder = EventRecorder(queue)
    task = await promise(queue, slow_to_end)
    async with working(queue):
        await recorder.until(EventType.STARTED)
        (failed,) = await recover(engine, "another worker", now=NOW + LEASE)
        clock.now = NOW + LEASE
        await queue.retry(failed)
        while (await engine.get(task.id)).status is not Status.RUNNING:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
    task = await engine.get(task.id)
    assert (failed.status, task.status, task.attempts) == (Status.FAILED, Status.QUEUED, 0)


async def test_a_worker_stops_even_while_the_database_refuses_writes(
    engine: Engine, clock: Clock
) -> None:
    """It stops without its last write; the next worker re-queues the task."""
    database = refusing(engine)
    queue = queue_of(database, wait_forever, now=clock)
    recorder = EventRecorder(queue)
    task = await promise(queue, wait_forever)
    worker = Worker(queue, None)
    await worker.start()
    await recorder.until(EventType.STARTED)
    database.refused |= {"claim", "settle"}
    async with asyncio.timeout(2):
        await worker.stop(grace=0)
    assert (await engine.get(task.id)).status is Status.RUNNING
    (recovered,) = await recover(engine, "worker-2", now=NOW + LEASE)
    assert recovered.id == task.id


async def test_a_worker_stops_even_if_the_database_driver_hides_a_cancellation(
    engine: Engine, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a server hangs, asyncpg turns a cancellation into a timeout."""

    async def hang(*_: object) -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            raise QueueUnavailable from None

    database = refusing(engine)
    queue = queue_of(database, wait_forever, now=clock)
    recorder = EventRecorder(queue)
    await promise(queue, wait_forever)
    worker = Worker(queue, None)
    await worker.start()
    await recorder.until(EventType.STARTED)
    monkeypatch.setattr(database, "_refuse", hang)
    database.refused |= {"claim", "settle"}
    async with asyncio.timeout(5):
        await worker.stop(grace=0)


# A wait that fails


async def test_a_wait_that_fails_is_logged_and_repeated_with_growing_pauses(
    engine: Engine, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker goes on to claim tasks. Without the pauses it would do nothing else."""
    monkeypatch.setattr(keep_trying_module, "FIRST_PAUSE_SECONDS", 0.02)
    waits = 0

    async def greet(context: Context[None]) -> None:
        pass

    async def fail_at_once(_: float) -> None:
        nonlocal waits
        waits += 1
        raise LookupError("a bug")

    monkeypatch.setattr(engine, "wait_for_tasks", fail_at_once)
    queue = queue_of(engine, greet, now=clock)
    recorder = EventRecorder(queue)
    with capture_logs() as lines:
        async with working(queue):
            await asyncio.sleep(0.2)
            await promise(queue, greet)
            await recorder.until(EventType.SUCCEEDED)
    assert 2 <= waits < 10
    errors = [line["event"] for line in lines if line["log_level"] == "error"]
    assert errors == ["database fails"] * waits


# A log that fails


class FullLog:
    """A logger on a full disk: structlog raises the error of the write by default."""

    def __getattr__(self, level: str) -> Callable[..., None]:
        """Return a method that raises, for each level."""

        def write(*_: object, **__: object) -> None:
            raise OSError(28, "No space left on device")

        return write


@pytest.mark.parametrize("error", [QueueUnavailable(), RuntimeError("a bug")], ids=repr)
async def test_a_log_on_a_full_disk_stops_neither_the_worker_nor_a_commit(
    engine: Engine, clock: Clock, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """The database may be on the same disk. Tasks must go on when both have space again."""
    for name in ("attempt", "events", "keep_trying", "pauses"):
        monkeypatch.setattr(f"afterward.{name}.log", FullLog())
    monkeypatch.setattr(keep_trying_module, "FIRST_PAUSE_SECONDS", 0.01)

    def no_random_numbers(_: float, __: float) -> float:
        raise OSError

    async def away(_: Context[None]) -> None:
        raise ServiceUnavailable("it is away")

    async def mistaken(_: Context[None]) -> None:
        raise ValueError

    database = refusing(engine, "claim")
    database.error = error
    policy = replace(LONGEST_WAITS, uniform=no_random_numbers)
    queue = queue_of(database, away, mistaken, now=clock, policy=policy)
    recorder = EventRecorder(queue)
    queue.events.subscribe(FullLog().write)
    async with working(queue):
        await promise(queue, away)
        await promise(queue, mistaken)
        await asyncio.sleep(0.05)
        database.refused.clear()
        await recorder.until(EventType.RETRYING)
        await recorder.until(EventType.FAILED)


# A database that refuses


class Refusing:
    """An engine that refuses some operations, as with a full disk."""

    def __init__(self, engine: Engine, refused: set[str]) -> None:
        self._engine = engine
        self.refused = refused
        self.error: Exception = QueueUnavailable()

    def __getattr__(self, verb: str) -> Any:
        """Return the engine's method, or one that refuses."""
        return self._refuse if verb in self.refused else getattr(self._engine, verb)

    async def _refuse(self, *_: object, **__: object) -> None:
        raise self.error


def refusing(engine: Engine, *verbs: str) -> Any:
    return Refusing(engine, set(verbs))


async def test_no_result_is_lost_while_the_database_refuses_writes(
    engine: Engine, clock: Clock
) -> None:
    """The worker keeps the outcome until it can write it, because the task must not run again."""
    ran = []

    async def send(context: Context[None]) -> str:
        ran.append(context.task.id)
        return "sent"

    database = refusing(engine, "settle")
    queue = queue_of(database, send, now=clock)
    recorder = EventRecorder(queue)
    task = await promise(queue, send)
    async with working(queue):
        await recorder.until(EventType.STARTED)
        await asyncio.sleep(0.05)
        assert (await engine.get(task.id)).status is Status.RUNNING
        database.refused.clear()
        await recorder.until(EventType.SUCCEEDED)
    assert ran == [task.id]
    assert (await engine.get(task.id)).result == '"sent"'


@pytest.mark.parametrize("error", [QueueUnavailable(), RuntimeError("a bug")], ids=repr)
async def test_a_worker_goes_on_when_the_database_is_back(
    engine: Engine, clock: Clock, error: Exception
) -> None:
    async def greet(context: Context[None]) -> None:
        pass

    database = refusing(engine)
    queue = queue_of(database, greet, now=clock)
    recorder = EventRecorder(queue)
    async with working(queue, lease=0.15):
        database.error = error
        database.refused |= {"claim", "extend", "pull_forward"}
        await promise(queue, greet)
        await asyncio.sleep(0.1)
        assert recorder.event_types == ["queued"]
        database.refused.clear()
        await recorder.until(EventType.SUCCEEDED)


async def test_the_leases_do_not_wait_for_retries_that_cannot_be_pulled_forward(
    engine: Engine, clock: Clock
) -> None:
    """Otherwise another worker would re-queue the tasks of a worker that lives."""
    database = refusing(engine, "pull_forward")
    extended_at: list[float] = []

    async def extend(*arguments: Any, **named: Any) -> Any:
        began = clock.now
        extended = await engine.extend(*arguments, **named)
        extended_at.append(began)
        return extended

    database.extend = extend
    queue = queue_of(database, wait_forever, now=clock)
    recorder = EventRecorder(queue)
    await promise(queue, wait_forever)
    async with working(queue, lease=0.15):
        await recorder.until(EventType.STARTED)
        clock.now += LEASE
        async with asyncio.timeout(30):
            while clock.now not in extended_at:  # noqa: ASYNC110 - the heartbeat changes it
                await asyncio.sleep(0.01)
        assert await recover(engine, "another worker", now=clock.now + 0.1) == []


async def test_more_retries_are_pulled_forward_than_one_statement_takes(
    engine: Engine, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heartbeat_module, "PULLED_AT_ONCE", 2)

    async def greet(context: Context[None]) -> None:
        pass

    queue = queue_of(engine, greet, now=clock)
    recorder = EventRecorder(queue)
    await put(engine, *(a_task() for _ in range(5)))
    for task in await claim_all(engine):
        await engine.settle(task, Outcome(Status.RETRYING, due_at=NOW + DAY), NOW)
    async with working(queue):
        await recorder.until(EventType.SUCCEEDED, times=5)


async def test_a_worker_between_two_refused_claims_stops_at_once(
    engine: Engine, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keep_trying_module, "FIRST_PAUSE_SECONDS", 60)
    worker = Worker(queue_of(refusing(engine, "claim"), wait_forever, now=clock), None)
    await worker.start()
    await asyncio.sleep(0.05)
    async with asyncio.timeout(30):
        await worker.stop(grace=60)


async def test_an_earlier_attempt_that_has_run_is_not_cancelled_by_a_new_claim(
    engine: Engine, clock: Clock
) -> None:
    """Its outcome is still being written. It changes nothing, but it is published as lost."""
    database = refusing(engine)

    async def send(context: Context[None]) -> None:
        if context.task.attempts == 1:
            database.refused.add("settle")

    queue = queue_of(database, send, now=clock)
    recorder = EventRecorder(queue)
    task = await promise(queue, send)
    async with working(queue):
        await recorder.until(EventType.STARTED)
        await recover(engine, "another worker", now=NOW + LEASE)
        clock.now = NOW + LEASE
        while (await engine.get(task.id)).claims < 2:  # noqa: ASYNC110 -- a test may poll
            await asyncio.sleep(0.005)
        database.refused.clear()
        await recorder.until(EventType.SUCCEEDED)
    lost, *_ = [event for event in recorder.events if event.type is EventType.LOST]
    assert lost.exception is None
