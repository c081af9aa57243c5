"""A task takes longer than its worker's lease, while another worker is idle.

It is not stolen as long as the heartbeat of its worker goes on.
"""

import asyncio
import time
from typing import Any

import pytest

from afterward.engine import Engine
from afterward.events import EventType
from afterward.unit_of_work import Context
from afterward.worker import Worker
from tests.library.support import Diary, promise, queue_of, working
from tests.support.torture import Tried, form

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("frequent_polls")]

LEASE = form(0.6, 2.0)  # seconds
LEASES = form(2, 10)  # that the task takes


async def outlast(context: Context[None]) -> None:
    """Take longer than a lease; a second attempt has no need to."""
    if context.task.attempts == 1:
        await asyncio.sleep(LEASES * LEASE)


async def run_between_two_workers(engine: Engine) -> list[str]:
    """What happened to a long task."""
    queue = queue_of(engine, outlast, now=time.time)
    diary = Diary(queue)
    await promise(queue, outlast)
    # With a slot free, a worker would find its own silent tasks before the other does.
    settings: dict[str, Any] = {"lease": LEASE, "concurrency": 1}
    async with working(queue, **settings), working(queue, **settings):
        await diary.until(EventType.SUCCEEDED, within=LEASES * LEASE + 10)
    return diary.whats


async def test_it_is_not_stolen(engine: Engine, tried: Tried) -> None:
    whats = await run_between_two_workers(engine)
    tried(f"a task of {LEASES} leases", f"stolen {whats.count('recovered')} times")
    assert whats == ["queued", "started", "succeeded"]


async def test_control_without_the_heartbeat_it_is(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, tried: Tried
) -> None:
    async def say_nothing(_: Worker[None]) -> None:
        pass

    monkeypatch.setattr(Worker, "_hold_on", say_nothing)
    whats = await run_between_two_workers(engine)
    tried(
        f"without a heartbeat, a task of {LEASES} leases",
        f"stolen {whats.count('recovered')} times",
    )
    assert whats.count("recovered") > 0
    assert whats.count("started") > 1
