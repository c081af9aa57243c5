"""A task runs longer than its worker's lease, while another worker is idle.

The idle worker does not re-queue the task, because the heartbeat renews the lease.
"""

import asyncio
import time
from typing import Any

import pytest

from afterward.engine import Engine
from afterward.events import EventType
from afterward.heartbeat import Heartbeat
from afterward.unit_of_work import Context
from tests.library.support import EventRecorder, promise, queue_of, working
from tests.support.torture import Tried, form

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("frequent_polls")]

LEASE = form(0.6, 2.0)  # seconds
LEASES = form(2, 10)  # the task's duration in leases


async def outlast(context: Context[None]) -> None:
    """Run longer than a lease at the first attempt, and return at once at the second."""
    if context.task.attempts == 1:
        await asyncio.sleep(LEASES * LEASE)


async def run_between_two_workers(engine: Engine) -> list[str]:
    """Run a long task while two workers look for work; return its events."""
    queue = queue_of(engine, outlast, now=time.time)
    recorder = EventRecorder(queue)
    await promise(queue, outlast)
    # With one slot, the worker that runs the task claims no other, so only the idle worker claims.
    settings: dict[str, Any] = {"lease": LEASE, "concurrency": 1}
    async with working(queue, **settings), working(queue, **settings):
        await recorder.until(EventType.SUCCEEDED, within=LEASES * LEASE + 10)
    return recorder.event_types


async def test_a_task_that_outlasts_its_lease_is_not_requeued(engine: Engine, tried: Tried) -> None:
    event_types = await run_between_two_workers(engine)
    tried(f"a task of {LEASES} leases", f"stolen {event_types.count('recovered')} times")
    assert event_types == ["queued", "started", "succeeded"]


async def test_control_without_a_heartbeat_the_task_is_requeued(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, tried: Tried
) -> None:
    async def say_nothing(_: Heartbeat) -> None:
        pass

    monkeypatch.setattr(Heartbeat, "_extend_leases", say_nothing)
    event_types = await run_between_two_workers(engine)
    tried(
        f"without a heartbeat, a task of {LEASES} leases",
        f"stolen {event_types.count('recovered')} times",
    )
    assert event_types.count("recovered") > 0
    assert event_types.count("started") > 1
