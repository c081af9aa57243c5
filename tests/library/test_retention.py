"""Retention goes on, whatever error the database raises."""

import asyncio
import contextlib

import pytest
from structlog.testing import capture_logs

from afterward import retention
from afterward.engine import Engine
from afterward.errors import QueueDamaged, QueueUnavailable
from afterward.retention import remove_old, remove_regularly
from afterward.task import Outcome, Status
from tests.library.support import DAY, NOW, Clock, a_task, claim_one, put, queue_of

pytestmark = pytest.mark.anyio


async def test_old_tasks_are_removed_in_several_transactions(
    engine: Engine, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention, "AT_ONCE", 2)
    await put(engine, *(a_task() for _ in range(5)))
    for ended_at in (NOW, NOW, NOW, NOW, NOW + DAY):
        await engine.settle(await claim_one(engine), Outcome(Status.SUCCEEDED), ended_at)
    with capture_logs() as lines:
        await remove_old(
            queue_of(engine, now=clock), finished_before=NOW + 1, failed_before=NOW + 1
        )
    assert [(line["event"], line["rows"]) for line in lines] == [("old tasks removed", 4)]
    assert (await engine.backlog()).counts[Status.SUCCEEDED] == 1


async def test_an_error_is_logged_and_the_next_round_tries_again(
    engine: Engine, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention, "EVERY_SECONDS", 0.001)
    unavailable = QueueUnavailable()
    unavailable.__cause__ = OSError(28, "No space left on device")
    # The engine itself has logged the damage, once.
    errors = iter([unavailable, RuntimeError("a bug"), QueueDamaged()])
    went_on = asyncio.Event()

    async def purge(**_: object) -> int:
        if error := next(errors, None):
            raise error
        went_on.set()
        return 0

    monkeypatch.setattr(engine, "purge", purge, raising=False)
    with capture_logs() as lines:
        rounds = asyncio.create_task(remove_regularly(queue_of(engine, now=clock), DAY, DAY))
        await asyncio.wait_for(went_on.wait(), 5)
        rounds.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await rounds
    assert [line["event"] for line in lines] == ["retention put off", "retention failed"]
    assert lines[0]["error"] == "OSError(28, 'No space left on device')"


async def test_a_log_on_a_full_disk_does_not_end_it(
    engine: Engine, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention, "EVERY_SECONDS", 0.001)
    went_on = asyncio.Event()
    errors = iter([QueueUnavailable(), RuntimeError("a bug")])

    async def purge(**_: object) -> int:
        if error := next(errors, None):
            raise error
        went_on.set()
        return 0

    def write(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(engine, "purge", purge, raising=False)
    monkeypatch.setattr(retention, "_log", write)
    rounds = asyncio.create_task(remove_regularly(queue_of(engine, now=clock), DAY, DAY))
    await asyncio.wait_for(went_on.wait(), 5)
    rounds.cancel()
    await asyncio.wait([rounds])


async def test_a_cancellation_that_the_driver_hides_ends_it(
    engine: Engine, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A driver may turn the cancellation into a timeout of its own."""
    asked = asyncio.Event()

    async def purge(**_: object) -> int:
        asked.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            raise QueueUnavailable from None
        return 0

    monkeypatch.setattr(engine, "purge", purge, raising=False)
    rounds = asyncio.create_task(remove_regularly(queue_of(engine, now=clock), DAY, DAY))
    await asyncio.wait_for(asked.wait(), 5)
    rounds.cancel()
    await asyncio.wait([rounds], timeout=5)
    assert rounds.cancelled()
