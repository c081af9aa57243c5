"""The clock jumps by a day, forward or back, while tasks wait for a retry, and while tasks run.

Waiting tasks do not stall: the next attempt comes within the longest back-off. They cause no storm:
each task gets only one more attempt. Running tasks continue.
"""

import asyncio
import time
from collections import Counter
from pathlib import Path

import pytest

from afterward.engine import Engine
from afterward.events import EventType
from afterward.heartbeat import Heartbeat
from afterward.task import Outcome, Status
from afterward.unit_of_work import Context
from afterward.worker import Worker
from tests.library.support import (
    DAY,
    KINDS,
    LONGEST_WAITS,
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
    working,
)
from tests.support.fake_clock import FakeClock
from tests.support.service import Service
from tests.support.smtp_server import SmtpServer
from tests.support.torture import Tried, form

pytestmark = pytest.mark.usefixtures("frequent_polls")

TASKS = form(20, 1_000)
HOUR = 3600.0
JUMPS = pytest.mark.parametrize("jump", [DAY, -DAY], ids=["forward", "back"])
SEND = "/send-notification/ada@example.com"


async def count_attempts_around_a_jump(
    engine: Engine, clock: Clock, jump: float, *, enough: int
) -> Counter[str]:
    """Run tasks that fail, let the clock jump, and work on until `enough` attempts have failed.

    Return the number of attempts of each task, before and after the jump.
    """
    tries: Counter[str] = Counter()

    async def fail(context: Context[None]) -> None:
        tries[context.task.id] += 1
        raise OSError

    queue = queue_of(engine, fail, now=clock, policy=LONGEST_WAITS)
    recorder = EventRecorder(queue)
    for _ in range(TASKS):
        await promise(queue, fail)
    await Worker(queue, None).run_until_idle()
    clock.now += jump
    async with working(queue, lease=0.15):
        await recorder.until(EventType.RETRYING, times=enough, within=30)
        await asyncio.sleep(0.3)  # time for many polls and several heartbeats
    return tries


@pytest.mark.anyio
@JUMPS
async def test_a_waiting_task_is_tried_once_more_after_a_jump(
    engine: Engine, clock: Clock, jump: float, tried: Tried
) -> None:
    """Then it waits again, no longer than without the jump."""
    tries = await count_attempts_around_a_jump(engine, clock, jump, enough=2 * TASKS)
    tasks = [await engine.get(task_id) for task_id in tries]
    longest = max((task.next_attempt_at or NOW) - clock.now for task in tasks)
    tried(
        f"a jump of {jump / DAY:+.0f} day while {TASKS:,} tasks wait",
        f"{sorted(Counter(tries.values()))} tries, the next within {longest:g} s",
    )
    assert Counter(tries.values()) == {2: TASKS}
    assert longest <= LONGEST_WAITS.ceiling(2)


@pytest.mark.anyio
async def test_control_without_a_correction_of_due_times_a_waiting_task_stalls(
    engine: Engine, clock: Clock, monkeypatch: pytest.MonkeyPatch, tried: Tried
) -> None:
    """After the clock was set back, no task is due for a day."""

    async def do_nothing(_: Heartbeat) -> None:
        pass

    monkeypatch.setattr(Heartbeat, "_pull_retries_forward", do_nothing)
    tries = await count_attempts_around_a_jump(engine, clock, -DAY, enough=TASKS)
    task = await engine.get(next(iter(tries)))
    wait = (task.next_attempt_at or NOW) - clock.now
    tried("a jump of -1 day, nothing pulled forward", f"the next try in {wait / HOUR:.0f} hours")
    assert Counter(tries.values()) == {1: TASKS}
    assert wait > DAY


@pytest.mark.anyio
@JUMPS
async def test_a_running_task_is_neither_lost_nor_repeated_after_a_jump(
    engine: Engine, clock: Clock, jump: float
) -> None:
    release = asyncio.Event()

    async def finish(context: Context[None]) -> None:
        await release.wait()

    queue = queue_of(engine, finish, now=clock)
    recorder = EventRecorder(queue)
    for _ in range(3):
        await promise(queue, finish)
    async with working(queue, lease=0.15):
        await recorder.until(EventType.STARTED, times=3)
        clock.now += jump
        await asyncio.sleep(0.3)
        release.set()
        await recorder.until(EventType.SUCCEEDED, times=3)
    assert Counter(recorder.event_types) == {"queued": 3, "started": 3, "succeeded": 3}


@pytest.mark.anyio
async def test_control_by_the_clock_alone_the_lease_of_a_running_task_expires(
    engine: Engine, clock: Clock, tried: Tried
) -> None:
    """Another worker re-queues the task. Its own worker never does."""
    await put(engine, a_task())
    await claim_one(engine)
    taken = await recover(engine, "another", now=NOW + DAY)
    tried("a jump of +1 day, for another worker", f"{len(taken)} of 1 running tasks taken back")
    assert [task.status for task in taken] == [Status.RETRYING]


@pytest.mark.anyio
async def test_after_the_clock_was_set_back_new_tasks_are_due_at_once_and_retries_soon(
    engine: Engine,
) -> None:
    await put(engine, a_task(), a_task())
    failed = await claim_one(engine)
    await engine.settle(failed, Outcome(Status.RETRYING, due_at=NOW + 60), NOW)
    yesterday = NOW - DAY
    (new,) = await claim_all(engine, now=yesterday)
    assert new.id != failed.id
    await engine.pull_forward(kinds=KINDS, now=yesterday, longest_wait=HOUR, limit=9)
    (retry,) = await claim_all(engine, now=yesterday)
    assert retry.id == failed.id


@pytest.mark.anyio
async def test_a_retry_within_the_longest_wait_keeps_its_time(engine: Engine) -> None:
    await put(engine, a_task(due_at=NOW + HOUR))
    await engine.pull_forward(kinds=KINDS, now=NOW, longest_wait=HOUR, limit=9)
    assert await claim_all(engine, now=NOW + HOUR - 1) == []


def test_a_service_continues_after_each_jump_of_its_clock(
    tmp_path: Path, queue_url: str, smtp_server: SmtpServer, tried: Tried
) -> None:
    """The service's clock jumps ahead and back, then behind and back. PostgreSQL's stays right."""
    clock = FakeClock(tmp_path)
    slowest = 0.0
    with Service(
        tmp_path,
        queue_url=queue_url,
        catcher=False,
        smtp_port=smtp_server.port,
        lease_seconds=1,
        retry_base_seconds=1,
        retry_max_seconds=1,
        **clock.settings,
    ) as service:
        for days in (1, -1):
            smtp_server.delay["dot"] = 1.0
            running = [service.post(SEND).json()["id"] for _ in range(5)]
            service.wait_for(running[-1], "running")
            clock.set(days=days)
            assert [service.wait_for(task_id)["attempts"] for task_id in running] == [1] * 5

            smtp_server.delay.clear()
            smtp_server.always["mail"] = "451 4.3.0 Later"
            waiting = [service.post(SEND).json()["id"] for _ in range(5)]
            service.wait_for(waiting[-1], "retrying")
            del smtp_server.always["mail"]
            clock.set(days=0)
            jumped = time.monotonic()
            for task_id in waiting:
                service.wait_for(task_id)
            slowest = max(slowest, time.monotonic() - jumped)

    engine = queue_url.partition(":")[0]
    tried(
        f"{engine}: a service whose clock jumps 4 times", f"waiting mail is sent in {slowest:.1f} s"
    )
    assert len(smtp_server.received) == 20
    assert slowest < 5  # the longest back-off is a second
