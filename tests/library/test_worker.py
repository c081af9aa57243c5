"""A worker does what was promised, and writes down how it ended: whatever happens meanwhile."""

import asyncio
import contextlib
import json
import time
from dataclasses import replace
from typing import Any, cast

import pytest

from afterward import keep_trying as keep_trying_module
from afterward import worker as worker_module
from afterward.engine import Engine
from afterward.errors import PermanentError, QueueUnavailable, TaskNotFound, TemporaryError
from afterward.events import Event, EventType
from afterward.queue import Queue
from afterward.registry import Registry, TaskKind
from afterward.retry import RetryPolicy
from afterward.task import Claim, Status, Task, Writes
from afterward.unit_of_work import Context
from afterward.worker import Worker
from tests.library.support import (
    DAY,
    LEASE,
    LONGEST_WAITS,
    NOW,
    Clock,
    Diary,
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


async def settled(queue: Queue[None], task: Task, **settings: Any) -> Task:
    """Work until nothing is due, and read what became of the task."""
    await Worker(queue, None, **settings).run_until_idle()
    return await queue.engine.get(task.id)


def error_of(task: Task) -> dict[str, Any]:
    assert task.error is not None
    error: dict[str, Any] = json.loads(task.error)
    return error


# Success


async def test_a_task_gets_its_arguments_and_leaves_its_result(
    engine: Engine, clock: Clock
) -> None:
    async def greet(context: Context[None], name: str, *, greeting: str) -> dict[str, str]:
        return {"said": f"{greeting} {name}"}

    queue = queue_of(engine, greet, now=clock)
    task = await settled(queue, await promise(queue, greet, "Ada", greeting="Hello"))
    assert (task.status, task.result) == (Status.SUCCEEDED, '{"said":"Hello Ada"}')
    assert (task.attempts, task.finished_at, task.error) == (1, NOW, None)


async def test_a_task_that_returns_nothing_has_no_result(engine: Engine, clock: Clock) -> None:
    async def nothing(context: Context[None]) -> None:
        pass

    queue = queue_of(engine, nothing, now=clock)
    task = await settled(queue, await promise(queue, nothing))
    assert (task.status, task.result) == (Status.SUCCEEDED, None)


async def test_a_task_is_told_about_itself_and_given_its_tools(
    engine: Engine, clock: Clock
) -> None:
    seen = []

    async def look(context: Context[str]) -> None:
        seen.append((context.task.id, context.task.attempts, context.tools))

    queue = Queue[str](engine, Registry(look), LONGEST_WAITS, now=clock)
    durable_tasks = queue.collect()
    task = durable_tasks.add_task(look)
    await queue.commit(durable_tasks.collected())
    await Worker(queue, "a hammer").run_until_idle()
    assert seen == [(task.id, 1, "a hammer")]


async def test_what_happens_is_told_in_order(engine: Engine, clock: Clock) -> None:
    """Each event carries the task as it stands then, the last one also how long it took."""

    async def halve(context: Context[None]) -> None:
        await context.report_progress(0.5)

    queue = queue_of(engine, halve, now=clock)
    diary = Diary(queue)
    task = await settled(queue, await promise(queue, halve))
    assert diary.whats == ["queued", "started", "progressed", "succeeded"]
    statuses = [event.task.status for event in diary.events]
    assert statuses == ["queued", "running", "running", "succeeded"]
    *before, last = diary.events
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
    diary = Diary(queue)
    durable_tasks = queue.collect("request-1")
    durable_tasks.add_task(upload)
    await queue.commit(durable_tasks.collected())
    await Worker(queue, None).run_until_idle()
    assert diary.whats == ["queued", "started", "succeeded", "queued", "started", "succeeded"]
    assert diary.events[-1].task.result == '"request-1"'
    assert (await engine.read_record("uploads", "1", client="")).body == {"size": 3}


# Failure


async def test_a_failed_attempt_is_made_again_when_its_wait_is_over(
    engine: Engine, clock: Clock
) -> None:
    async def fail_at_first(context: Context[None]) -> str:
        if context.task.attempts == 1:
            raise TemporaryError("mailbox busy", smtp_code=450, smtp_text=None)
        return "at last"

    queue = queue_of(engine, fail_at_first, now=clock, policy=LONGEST_WAITS)
    diary = Diary(queue)
    task = await settled(queue, await promise(queue, fail_at_first))
    assert (task.status, task.attempts, task.next_attempt_at) == (Status.RETRYING, 1, NOW + 10)
    assert error_of(task) == {
        "type": "TemporaryError",
        "detail": "mailbox busy",
        "smtp_code": 450,
    }
    assert isinstance(diary.events[-1].exception, TemporaryError)

    clock.now = NOW + 10
    task = await settled(queue, task)
    assert (task.status, task.attempts, task.result) == (Status.SUCCEEDED, 2, '"at last"')
    assert (task.next_attempt_at, task.error) == (None, None)
    assert diary.whats == ["queued", "started", "retrying", "started", "succeeded"]


async def test_a_task_fails_when_its_attempts_run_out(engine: Engine, clock: Clock) -> None:
    async def fail(context: Context[None]) -> None:
        raise OSError("x" * 5000)

    queue = queue_of(engine, fail, now=clock)
    diary = Diary(queue)
    task = await settled(queue, await promise(queue, fail))
    assert (task.status, task.attempts) == (Status.FAILED, 3)
    assert error_of(task) == {"type": "OSError", "detail": "x" * 1000}
    assert diary.whats == ["queued", *["started", "retrying"] * 2, "started", "failed"]


async def test_a_permanent_error_fails_a_task_at_once(engine: Engine, clock: Clock) -> None:
    """With what is known about it, for whoever reads the task."""

    async def refuse(context: Context[None]) -> None:
        raise PermanentError("no such mailbox", smtp_code=550)

    queue = queue_of(engine, refuse, now=clock)
    task = await settled(queue, await promise(queue, refuse))
    assert (task.status, task.attempts) == (Status.FAILED, 1)
    assert error_of(task) == {
        "type": "PermanentError",
        "detail": "no such mailbox",
        "smtp_code": 550,
    }


async def test_an_attempt_that_takes_too_long_is_ended(engine: Engine, clock: Clock) -> None:
    queue = queue_of(engine, wait_forever, now=clock)
    task = await settled(queue, await promise(queue, wait_forever), task_timeout=0.01)
    assert (task.status, task.attempts) == (Status.FAILED, 3)
    assert error_of(task) == {
        "type": "TimeoutError",
        "detail": "the attempt took longer than 0.01 s",
    }


async def test_a_timeout_of_the_tasks_own_keeps_its_words(engine: Engine, clock: Clock) -> None:
    async def connect(context: Context[None]) -> None:
        raise TimeoutError("the server did not answer")

    queue = queue_of(engine, connect, now=clock)
    task = await settled(queue, await promise(queue, connect))
    assert error_of(task)["detail"] == "the server did not answer"


async def test_a_task_of_an_unknown_name_waits_for_a_worker_that_knows_it(
    engine: Engine, clock: Clock
) -> None:
    """During a rolling upgrade an old worker must not fail what a new one can do."""
    await put(engine, task := a_task(kind="renamed"))
    assert await settled(queue_of(engine, now=clock), task) == task


async def test_a_result_that_is_not_json_fails_the_task_which_runs_once(
    engine: Engine, clock: Clock
) -> None:
    ran = []

    async def careless(context: Context[None]) -> object:
        ran.append(context.task.id)
        return object()

    queue = queue_of(engine, careless, now=clock)
    task = await settled(queue, await promise(queue, careless))
    assert (task.status, ran) == (Status.FAILED, [task.id])
    assert error_of(task)["type"] == "UnusableResult"
    assert "the work was done" in error_of(task)["detail"]


@pytest.mark.parametrize("where", ["record", "follow-up"])
async def test_what_json_has_no_form_for_is_a_failure(
    engine: Engine, clock: Clock, where: str
) -> None:
    """Of the task, not of the worker."""

    async def careless(context: Context[None], value: Any = None) -> None:
        if where == "record":
            context.durable_tasks.add_record("uploads", "1", {"value": object()})
        if where == "follow-up":
            context.durable_tasks.add_task(careless, object())

    queue = queue_of(engine, careless, now=clock)
    task = await settled(queue, await promise(queue, careless))
    assert task.status is Status.FAILED
    assert error_of(task)["type"] == "TypeError"


async def test_arguments_that_cannot_be_read_fail_their_task_alone(
    engine: Engine, clock: Clock
) -> None:
    async def greet(context: Context[None]) -> None:
        pass

    queue = queue_of(engine, greet, now=clock)
    await put(engine, broken := a_task(arguments='{"args":[]}'))
    task = await settled(queue, await promise(queue, greet))
    assert task.status is Status.SUCCEEDED
    broken = await engine.get(broken.id)
    assert (broken.status, broken.attempts) == (Status.FAILED, 1)
    assert "arguments cannot be read" in error_of(broken)["detail"]


class Odd(Exception):
    """Raises when it is asked for its description."""

    def __str__(self) -> str:
        """Take something for a document that is none."""
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
async def test_an_error_of_any_shape_settles_its_attempt(
    engine: Engine, clock: Clock, error: BaseException
) -> None:
    async def fail(context: Context[None]) -> None:
        raise error

    queue = queue_of(engine, fail, now=clock)
    task = await settled(queue, await promise(queue, fail))
    assert (task.status, task.attempts) == (Status.FAILED, 3)
    assert error_of(task)["type"] == type(error).__name__


async def test_a_listener_that_raises_harms_neither_the_task_nor_other_listeners(
    engine: Engine, clock: Clock
) -> None:
    async def greet(context: Context[None]) -> None:
        pass

    def careless(event: Event) -> None:
        raise LookupError(event.type)

    queue = queue_of(engine, greet, now=clock)
    queue.events.subscribe(careless)
    diary = Diary(queue)
    task = await settled(queue, await promise(queue, greet))
    assert task.status is Status.SUCCEEDED
    assert diary.whats == ["queued", "started", "succeeded"]


async def test_an_outcome_that_the_database_does_not_take_fails_the_task(
    engine: Engine, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be written in vain, and its task run, for as long as the process lives."""
    monkeypatch.setattr(keep_trying_module, "FIRST_PAUSE_SECONDS", 0.001)

    async def careless(context: Context[None]) -> None:
        context.durable_tasks.add_record("uploads", "1", body := {"size": 3})
        body["size"] = object()  # type: ignore[assignment]

    queue = queue_of(engine, careless, now=clock)
    diary = Diary(queue)
    task = await settled(queue, await promise(queue, careless))
    assert (task.status, task.attempts) == (Status.FAILED, 1)
    assert error_of(task)["type"] == "OutcomeNotWritten"
    assert diary.whats == ["queued", "started", "failed"]


# Patience


async def test_the_outside_world_is_waited_for_until_the_time_is_over(
    engine: Engine, clock: Clock
) -> None:
    """Then the task fails, with its last error."""

    async def greylisted(context: Context[None]) -> None:
        raise TemporaryError("greylisted", smtp_code=451)

    queue = queue_of(engine, greylisted, now=clock, policy=AN_HOUR)
    task = await promise(queue, greylisted)
    assert (task.max_attempts, task.gives_up_at) == (None, NOW + 3600)
    while (task := await settled(queue, task)).status is Status.RETRYING:
        assert clock.now < task.due_at <= NOW + 3600
        clock.now = task.due_at
    assert (task.status, task.finished_at) == (Status.FAILED, NOW + 3600)
    assert (task.attempts, task.errors) == (11, 0)
    assert error_of(task)["smtp_code"] == 451

    clock.now = NOW + DAY
    task = await queue.retry(task, Writes())
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
    diary = Diary(queue)
    await promise(queue, fail)
    async with working(queue, lease=0.03):
        retrying = await diary.until(EventType.RETRYING)
        await asyncio.sleep(0.1)
        assert await engine.get(retrying.task.id) == retrying.task
    assert retrying.task.due_at == NOW + 3600


async def test_errors_that_nobody_expected_are_borne_a_few_times_only(
    engine: Engine, clock: Clock
) -> None:
    """Failures of the outside world in between do not count."""
    errors = iter([OSError(), TemporaryError("busy"), OSError(), TemporaryError("busy"), OSError()])

    async def fail(context: Context[None]) -> None:
        raise next(errors)

    queue = queue_of(engine, fail, now=clock, policy=replace(AN_HOUR, base=0.0))
    task = await settled(queue, await promise(queue, fail))
    assert (task.status, task.attempts, task.errors) == (Status.FAILED, 5, 3)


@pytest.mark.parametrize("error", [asyncio.CancelledError, SystemExit, KeyboardInterrupt])
async def test_nothing_that_a_task_raises_stops_the_worker(
    engine: Engine, clock: Clock, error: type[BaseException]
) -> None:
    """Not even what is no Exception; and the attempt counts, or it would be made for ever."""

    async def wild(context: Context[None]) -> None:
        raise error

    queue = queue_of(engine, wild, now=clock)
    first, second = await promise(queue, wild), await promise(queue, wild)
    await Worker(queue, None, concurrency=1).run_until_idle()
    for task in (await engine.get(first.id), await engine.get(second.id)):
        assert (task.status, task.attempts) == (Status.FAILED, 3)
        assert error_of(task)["type"] == error.__name__


async def test_follow_ups_of_a_failure_are_forgotten(engine: Engine, clock: Clock) -> None:
    """The next attempt adds them again."""
    added = []

    async def fail_late(context: Context[None]) -> None:
        added.append(context.durable_tasks.add_task(wait_forever))
        raise OSError

    queue = queue_of(engine, fail_late, wait_forever, now=clock)
    await settled(queue, await promise(queue, fail_late))
    assert len(added) == 3
    for task in added:
        with pytest.raises(TaskNotFound):
            await engine.get(task.id)


# Progress


@pytest.mark.parametrize(("told", "noted"), [(0.25, 0.25), (-1, 0), (7, 1)])
async def test_progress_is_between_nothing_and_all(
    engine: Engine, clock: Clock, told: float, noted: float
) -> None:
    async def tell(context: Context[None]) -> None:
        await context.report_progress(told)

    queue = queue_of(engine, tell, now=clock)
    task = await settled(queue, await promise(queue, tell))
    assert task.progress == noted


async def test_progress_that_cannot_be_noted_is_let_go(engine: Engine, clock: Clock) -> None:
    async def tell(context: Context[None]) -> None:
        await context.report_progress(0.5)

    queue = queue_of(refusing(engine, "report"), tell, now=clock)
    task = await settled(queue, await promise(queue, tell))
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
    diary = Diary(queue)
    for _ in range(20):
        await promise(queue, count)
    async with working(queue, concurrency=3):
        await diary.until(EventType.SUCCEEDED, times=20)
    assert most == 3


async def test_a_task_begins_when_the_end_of_the_one_before_it_is_on_disk(
    engine: Engine, clock: Clock
) -> None:
    """Claimed it is before; but if it began, more could run again after a crash than allowed."""
    begun = []
    disk_is_slow = asyncio.Event()

    async def run(context: Context[None], name: str) -> None:
        begun.append(name)
        if name == "long":
            await asyncio.Event().wait()

    class Slow:
        """The engine, whose disk is slow when it comes to one task."""

        def __getattr__(self, verb: str) -> Any:
            return getattr(engine, verb)

        async def settle(self, task: Task, *outcome: Any) -> Task | None:
            if task.id == first.id:
                await disk_is_slow.wait()
            return await engine.settle(task, *outcome)

    queue = queue_of(cast(Engine, Slow()), run, now=clock)
    diary = Diary(queue)
    first, _, _, last = [
        await promise(queue, run, name) for name in ("slow", "quick", "long", "last")
    ]
    async with working(queue, concurrency=2):
        await diary.until(EventType.STARTED, times=3)
        await asyncio.sleep(0.05)
        assert begun == ["slow", "quick", "long"]
        assert (await engine.get(last.id)).status is Status.RUNNING
        disk_is_slow.set()
        await diary.until(EventType.STARTED, times=4)
    assert begun == ["slow", "quick", "long", "last"]


async def test_a_worker_is_busy_while_tasks_come_and_go(
    engine: Engine, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that waits for a long time takes nothing from those who ask."""
    queue = queue_of(engine, wait_forever, now=clock)
    diary = Diary(queue)
    async with working(queue) as worker:
        was_busy = [worker.is_busy]
        await promise(queue, wait_forever)
        await diary.until(EventType.STARTED)
        monkeypatch.setattr(worker_module, "QUIET_SECONDS", 60)
        was_busy.append(worker.is_busy)
        monkeypatch.setattr(worker_module, "QUIET_SECONDS", 0)
        was_busy.append(worker.is_busy)
    assert was_busy == [False, True, False]


async def test_each_task_runs_once_however_many_workers_there_are(
    engine: Engine, clock: Clock
) -> None:
    ran = []

    async def run(context: Context[None]) -> None:
        ran.append(context.task.id)
        await asyncio.sleep(0.001)

    queue = queue_of(engine, run, now=clock)
    diary = Diary(queue)
    tasks = [await promise(queue, run) for _ in range(50)]
    async with working(queue, concurrency=3), working(queue, concurrency=3):
        await diary.until(EventType.SUCCEEDED, times=50)
    assert sorted(ran) == sorted(task.id for task in tasks)


async def test_an_idle_worker_begins_at_once(
    engine: Engine, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does not look in from time to time: the commit wakes it."""
    monkeypatch.setattr(worker_module, "POLL_SECONDS", 600.0)

    async def greet(context: Context[None]) -> None:
        pass

    queue = queue_of(engine, greet, now=clock)
    diary = Diary(queue)
    async with working(queue):
        await asyncio.sleep(0.05)
        await promise(queue, greet)
        await diary.until(EventType.SUCCEEDED)  # long before the next poll


async def test_a_retry_needs_nobody_to_wake_the_worker(engine: Engine) -> None:
    async def fail_at_first(context: Context[None]) -> None:
        if context.task.attempts == 1:
            raise OSError

    queue = queue_of(engine, fail_at_first, now=time.time)
    diary = Diary(queue)
    async with working(queue):
        await promise(queue, fail_at_first)
        await diary.until(EventType.SUCCEEDED)


# Leases


async def take_over(engine: Engine) -> Task:
    """Let another worker re-queue the task, whose lease has expired by its clock, and claim it."""
    now = NOW + LEASE + 1
    await recover(engine, "another worker", now=now)
    return await claim_one(engine, "another worker", now=now)


async def test_an_attempt_whose_task_was_lost_is_cancelled(engine: Engine, clock: Clock) -> None:
    """At the next heartbeat; what it did since then changes nothing in the record."""
    queue = queue_of(engine, wait_forever, now=clock)
    diary = Diary(queue)
    await promise(queue, wait_forever)
    async with working(queue, concurrency=1, lease=0.15):
        await diary.until(EventType.STARTED)
        taken = await take_over(engine)
        lost = await diary.until(EventType.LOST)
    assert isinstance(lost.exception, asyncio.CancelledError)
    assert await engine.get(taken.id) == taken


async def test_an_attempt_whose_task_was_lost_is_heard_no_more(
    engine: Engine, clock: Clock
) -> None:
    """Neither its progress, nor its success, nor its follow-ups."""

    async def lose(context: Context[None]) -> None:
        await take_over(engine)
        await context.report_progress(0.5)
        context.durable_tasks.add_task(lose)

    queue = queue_of(engine, lose, now=clock)
    diary = Diary(queue)
    task = await settled(queue, await promise(queue, lose))
    assert diary.whats == ["queued", "started", "lost"]
    assert (task.status, task.owner, task.progress) == (Status.RUNNING, "another worker", None)


async def test_a_task_lost_and_won_back_runs_once_at_a_time(engine: Engine, clock: Clock) -> None:
    """The earlier attempt ends before the next one begins."""
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
    diary = Diary(queue)
    await promise(queue, only_one)
    async with working(queue):
        await diary.until(EventType.STARTED)
        await recover(engine, "another worker", now=NOW + LEASE)
        clock.now = NOW + LEASE
        await diary.until(EventType.SUCCEEDED)
    assert diary.whats == ["queued", "started", "lost", "started", "succeeded"]


async def test_an_earlier_attempt_that_does_not_end_at_once_is_waited_for(
    engine: Engine, clock: Clock
) -> None:
    """It cleans up for longer than the worker waits for anything; then the next attempt runs."""
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
    diary = Diary(queue)
    task = await promise(queue, slow_to_end)
    async with working(queue):
        await diary.until(EventType.STARTED)
        await recover(engine, "another worker", now=NOW + LEASE)
        clock.now = NOW + LEASE
        while (await engine.get(task.id)).status is not Status.RUNNING:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
        await asyncio.sleep(worker_module.LAST_WRITES_SECONDS + 0.1)
        cleaned.set()
        await diary.until(EventType.SUCCEEDED)
    assert steps == ["begins 1", "ends 1", "begins 2"]
    assert diary.whats == ["queued", "started", "lost", "started", "succeeded"]


async def test_an_attempt_behind_one_that_never_ends_fails_in_time(
    engine: Engine, clock: Clock
) -> None:
    stuck = asyncio.Event()

    async def never_ends(context: Context[None]) -> None:
        while context.task.attempts == 1 and not stuck.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await stuck.wait()

    queue = queue_of(engine, never_ends, now=clock, policy=LONGEST_WAITS)
    diary = Diary(queue)
    await promise(queue, never_ends)
    async with working(queue) as worker:
        await diary.until(EventType.STARTED)
        await recover(engine, "another worker", now=NOW + LEASE)
        worker._task_timeout = 0.05
        clock.now = NOW + LEASE
        retrying = await diary.until(EventType.RETRYING)
        stuck.set()
    assert error_of(retrying.task)["detail"] == "an earlier attempt of this task does not end"


async def test_a_heartbeat_ends_an_attempt_whose_task_is_held_by_another_claim(
    engine: Engine, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This worker lost the task and won it back: what counts is the claim, not the task."""
    queue = queue_of(engine, wait_forever, now=clock)
    diary = Diary(queue)
    task = await promise(queue, wait_forever)

    async def extend(*_: object, **__: object) -> set[tuple[str, int]]:
        return {(task.id, 2)}

    monkeypatch.setattr(engine, "extend", extend)
    async with working(queue, lease=0.15):
        given_back = await diary.until(EventType.GIVEN_BACK)
    assert isinstance(given_back.exception, asyncio.CancelledError)


async def test_the_tasks_of_dead_workers_are_taken_back_at_the_start(
    engine: Engine, clock: Clock
) -> None:
    """And told of: those to be run again, and those that crashed once too often."""

    async def survive(context: Context[None]) -> None:
        pass

    queue = queue_of(engine, survive, now=clock)
    diary = Diary(queue)
    await promise(queue, survive)
    await put(engine, deadly := a_task(max_attempts=1, kind="survive"))
    await claim_all(engine, "a dead worker")
    clock.now = NOW + LEASE
    async with working(queue):
        await diary.until(EventType.SUCCEEDED)
    assert sorted(diary.whats[1:3]) == ["failed", "recovered"]
    assert error_of(await engine.get(deadly.id))["type"] == "WorkerDied"


async def test_the_tasks_of_a_worker_that_dies_later_are_taken_back_too(
    engine: Engine, clock: Clock
) -> None:
    async def survive(context: Context[None]) -> None:
        pass

    queue = queue_of(engine, survive, now=clock)
    diary = Diary(queue)
    await promise(queue, survive)
    await claim_one(engine, "a worker that lives")
    async with working(queue, lease=0.15):
        await asyncio.sleep(0.1)
        clock.now = NOW + LEASE
        await diary.until(EventType.SUCCEEDED)
    assert diary.whats == ["queued", "recovered", "started", "succeeded"]
    crashes = [event.task.crashes for event in diary.events]
    assert crashes == [0, 1, 1, 0], "crashes in a row"


async def test_tasks_of_one_crash_do_not_run_side_by_side_again(
    engine: Engine, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of them may have killed the worker; the others must not die with it three times.

    When one has ended, the next one begins: nobody waits for the worker to look again.
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
    diary = Diary(queue)
    tasks = [await promise(queue, run) for _ in range(5)]
    await claim_all(engine, "a dead worker")
    clock.now = NOW + LEASE
    tasks += [await promise(queue, run) for _ in range(5)]
    async with working(queue, concurrency=20):
        await diary.until(EventType.SUCCEEDED, times=len(tasks))
    assert (most, fresh) == (1, 5)
    for task in tasks[:5]:
        done = await engine.get(task.id)
        assert (done.attempts, done.error) == (2, None)


async def test_a_late_result_is_told_of_though_its_task_was_lost(
    engine: Engine, clock: Clock
) -> None:
    """The heartbeat does not end an attempt that has run, and only waits to write it down."""
    database = refusing(engine)

    async def send(context: Context[None]) -> None:
        database.refused.add("settle")

    queue = queue_of(database, send, now=clock)
    diary = Diary(queue)
    await promise(queue, send)
    async with working(queue, concurrency=1, lease=0.15):
        await diary.until(EventType.STARTED)
        await take_over(engine)
        await asyncio.sleep(0.2)
        database.refused.clear()
        lost = await diary.until(EventType.LOST)
    assert lost.exception is None


# Stopping


async def test_a_stopping_worker_lets_tasks_finish_within_the_grace(
    engine: Engine, clock: Clock
) -> None:
    """And takes no others."""
    release = asyncio.Event()

    async def finish(context: Context[None]) -> None:
        await release.wait()

    queue = queue_of(engine, finish, now=clock)
    diary = Diary(queue)
    first, second = await promise(queue, finish), await promise(queue, finish)
    worker = Worker(queue, None, concurrency=1)
    await worker.start()
    await diary.until(EventType.STARTED)
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
        async with asyncio.timeout(worker_module.LAST_WRITES_SECONDS / 2):
            await worker.stop(grace=60)


async def test_what_a_stopping_worker_has_just_claimed_runs(engine: Engine, clock: Clock) -> None:
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
async def test_a_claim_under_way_at_the_stop_is_waited_for(
    engine: Engine, clock: Clock, monkeypatch: pytest.MonkeyPatch, grace: float
) -> None:
    """Its tasks run within the grace, or are given back; no attempt counts that never ran."""
    committed = asyncio.Event()
    claim = engine.claim

    async def claim_slowly(*arguments: Any, **settings: Any) -> Claim:
        claimed = await claim(*arguments, **settings)
        await committed.wait()
        return claimed

    monkeypatch.setattr(engine, "claim", claim_slowly)
    monkeypatch.setattr(worker_module, "LAST_WRITES_SECONDS", 0.2 if grace else 30)
    queue = queue_of(engine, wait_forever, now=clock, policy=replace(LONGEST_WAITS, attempts=1))
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


async def test_an_attempt_that_hides_its_cancellation_at_the_stop_is_given_back(
    engine: Engine, clock: Clock
) -> None:
    """Whatever it makes of the cancellation, the stop is none of the task's doing."""

    async def hide(context: Context[None]) -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            raise OSError from None

    queue = queue_of(engine, hide, now=clock)
    diary = Diary(queue)
    task = await promise(queue, hide)
    async with working(queue):
        await diary.until(EventType.STARTED)
    task = await engine.get(task.id)
    assert (task.status, task.attempts, task.errors) == (Status.QUEUED, 0, 0)


async def test_a_worker_stops_even_while_the_database_refuses(engine: Engine, clock: Clock) -> None:
    """It goes without its last write; the next worker takes the task back."""
    database = refusing(engine)
    queue = queue_of(database, wait_forever, now=clock)
    diary = Diary(queue)
    task = await promise(queue, wait_forever)
    worker = Worker(queue, None)
    await worker.start()
    await diary.until(EventType.STARTED)
    database.refused |= {"claim", "settle"}
    async with asyncio.timeout(2):
        await worker.stop(grace=0)
    assert (await engine.get(task.id)).status is Status.RUNNING
    (recovered,) = await recover(engine, "worker-2", now=NOW + LEASE)
    assert recovered.id == task.id


async def test_a_worker_stops_though_the_driver_hides_its_cancellation(
    engine: Engine, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As asyncpg does while a server hangs: it makes a timeout of it."""

    async def hang(*_: object) -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            raise QueueUnavailable from None

    database = refusing(engine)
    queue = queue_of(database, wait_forever, now=clock)
    diary = Diary(queue)
    await promise(queue, wait_forever)
    worker = Worker(queue, None)
    await worker.start()
    await diary.until(EventType.STARTED)
    monkeypatch.setattr(database, "_refuse", hang)
    database.refused |= {"claim", "settle"}
    async with asyncio.timeout(5):
        await worker.stop(grace=0)


# A database that refuses


class Refusing:
    """An engine whose database refuses some of its verbs, as a full disk would."""

    def __init__(self, engine: Engine, refused: set[str]) -> None:
        self._engine = engine
        self.refused = refused
        self.error: Exception = QueueUnavailable()

    def __getattr__(self, verb: str) -> Any:
        """Refuse, or pass on what is asked."""
        return self._refuse if verb in self.refused else getattr(self._engine, verb)

    async def _refuse(self, *_: object, **__: object) -> None:
        raise self.error


def refusing(engine: Engine, *verbs: str) -> Any:
    return Refusing(engine, set(verbs))


async def test_no_result_is_lost_while_the_database_refuses(engine: Engine, clock: Clock) -> None:
    """The task has run, so it must not run again: its outcome is kept until it can be written."""
    ran = []

    async def send(context: Context[None]) -> str:
        ran.append(context.task.id)
        return "sent"

    database = refusing(engine, "settle")
    queue = queue_of(database, send, now=clock)
    diary = Diary(queue)
    task = await promise(queue, send)
    async with working(queue):
        await diary.until(EventType.STARTED)
        await asyncio.sleep(0.05)
        assert (await engine.get(task.id)).status is Status.RUNNING
        database.refused.clear()
        await diary.until(EventType.SUCCEEDED)
    assert ran == [task.id]
    assert (await engine.get(task.id)).result == '"sent"'


@pytest.mark.parametrize("error", [QueueUnavailable(), RuntimeError("a bug")], ids=repr)
async def test_a_worker_goes_on_when_the_database_does(
    engine: Engine, clock: Clock, error: Exception
) -> None:
    async def greet(context: Context[None]) -> None:
        pass

    database = refusing(engine)
    queue = queue_of(database, greet, now=clock)
    diary = Diary(queue)
    async with working(queue, lease=0.15):
        database.error = error
        database.refused |= {"claim", "extend", "pull_forward"}
        await promise(queue, greet)
        await asyncio.sleep(0.1)
        assert diary.whats == ["queued"]
        database.refused.clear()
        await diary.until(EventType.SUCCEEDED)


async def test_a_worker_whose_claims_are_refused_stops_without_waiting_for_the_next_one(
    engine: Engine, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keep_trying_module, "FIRST_PAUSE_SECONDS", 60)
    worker = Worker(queue_of(refusing(engine, "claim"), wait_forever, now=clock), None)
    await worker.start()
    await asyncio.sleep(0.05)
    async with asyncio.timeout(30):
        await worker.stop(grace=60)


async def test_an_earlier_attempt_that_has_run_is_not_cancelled_when_its_task_is_won_back(
    engine: Engine, clock: Clock
) -> None:
    """It is being written that it has ended, which is told, though it changes nothing any more."""
    database = refusing(engine)

    async def send(context: Context[None]) -> None:
        if context.task.attempts == 1:
            database.refused.add("settle")

    queue = queue_of(database, send, now=clock)
    diary = Diary(queue)
    task = await promise(queue, send)
    async with working(queue):
        await diary.until(EventType.STARTED)
        await recover(engine, "another worker", now=NOW + LEASE)
        clock.now = NOW + LEASE
        while (await engine.get(task.id)).claims < 2:  # noqa: ASYNC110 -- a test may poll
            await asyncio.sleep(0.005)
        database.refused.clear()
        await diary.until(EventType.SUCCEEDED)
    lost, *_ = [event for event in diary.events if event.type is EventType.LOST]
    assert lost.exception is None
