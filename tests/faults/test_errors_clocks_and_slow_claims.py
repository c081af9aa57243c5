"""An error without a description, a clock set back, a slow claim, and a shared store.

A task that raises an error with a failing str() gets an outcome. A new task is due at once, however
far the clock was set back. A stop during a slow claim gives the claimed tasks back without counting
an attempt. A clean-up removes no files of another database on the same store.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, cast

import pytest

from afterward.engine import Engine
from afterward.engines.sqlite.engine import SQLite
from afterward.filter import TaskFilter
from afterward.queue import Queue
from afterward.retry import RetryPolicy
from afterward.task import Claim, Record, Status, Writes, new_id, to_json
from afterward.unit_of_work import Context
from afterward.worker import Worker
from app.settings import Settings
from app.tasks import registry
from app.tasks.clean_up import clean_up
from app.tasks.pending_uploads import COLLECTION as PENDING
from app.tasks.pending_uploads import PendingUploads
from app.tasks.tools import Tools
from app.uploads.local import LocalStore
from tests.library.support import (
    DAY,
    LEASE,
    NO_WAITS,
    NOW,
    Clock,
    a_task,
    claim_all,
    opened,
    promise,
    put,
    queue_of,
    recover,
)
from tests.support.service import files_below
from tests.support.torture import Tried, form

pytestmark = pytest.mark.anyio

TASKS = form(20, 1000)


class Mute(Exception):
    """An error with a __str__ that raises another error."""

    def __str__(self) -> str:
        """Raise."""
        raise RuntimeError("there are no words for it")


async def raise_mute(_: Context[None]) -> None:
    raise Mute


async def statuses_after(engine: Engine, function: Callable[..., Any]) -> set[Status]:
    queue = queue_of(engine, function, now=Clock(), policy=NO_WAITS)
    tasks = [await promise(queue, function) for _ in range(TASKS)]
    async with asyncio.timeout(60):
        await Worker(queue, None).run_until_idle()
    return {(await engine.get(task.id)).status for task in tasks}


async def test_a_task_with_an_error_that_cannot_be_described_fails(
    tmp_path: Path, tried: Tried
) -> None:
    async with opened(tmp_path / "queue.db") as engine:
        assert await statuses_after(engine, raise_mute) == {Status.FAILED}
    tried(f"{TASKS} tasks raise an error whose str() raises", "0 stuck")


async def test_control_without_the_fallback_description_tasks_stay_running(
    tmp_path: Path, tried: Tried, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("afterward.attempt.error_as_json", lambda error: to_json(str(error)))
    async with opened(tmp_path / "queue.db") as engine:
        with pytest.raises(RuntimeError, match="no words"):
            await statuses_after(engine, raise_mute)
        left = await engine.list_tasks(TaskFilter(statuses=(Status.RUNNING,)), limit=TASKS)
    tried("the same without the fallback description", f"{len(left)} stuck")
    assert left


@pytest.mark.parametrize("back", [1.0, 60.0, 3000.0, DAY, 400 * DAY])
async def test_a_new_task_is_due_at_once_after_the_clock_was_set_back(
    tmp_path: Path, tried: Tried, back: float
) -> None:
    async with opened(tmp_path / "queue.db") as engine:
        await put(engine, *(a_task() for _ in range(TASKS)))
        claimed = await claim_all(engine, now=NOW - back)
    tried(f"{TASKS} new tasks, the clock set back by {back:g} s", f"{len(claimed)} due at once")
    assert len(claimed) == TASKS


async def test_control_a_task_with_a_due_time_in_the_future_is_not_due(tmp_path: Path) -> None:
    async with opened(tmp_path / "queue.db") as engine:
        await put(engine, a_task(due_at=NOW + 60))
        assert await claim_all(engine, now=NOW) == []


class SlowClaims(SQLite):
    """An engine that commits a claim, and delays the answer to the worker."""

    answers: asyncio.Event

    async def claim(self, *args: Any, **kwargs: Any) -> Claim:
        """Claim tasks, then wait for `answers` before returning them."""
        claimed = await super().claim(*args, **kwargs)
        if claimed.running:
            await self.answers.wait()
        return claimed


async def test_a_stop_during_a_slow_claim_gives_its_tasks_back_without_counting_an_attempt(
    tmp_path: Path, tried: Tried
) -> None:
    async def greet(context: Context[None]) -> None:
        await asyncio.Event().wait()

    engine = SlowClaims(tmp_path / "queue.db")
    engine.answers = asyncio.Event()
    await engine.start()
    try:
        queue = queue_of(engine, greet, now=Clock())
        tasks = [await promise(queue, greet) for _ in range(5)]
        worker = Worker(queue, None, concurrency=5)
        await worker.start()
        while (await engine.get(tasks[0].id)).status is not Status.RUNNING:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        stopping = asyncio.create_task(worker.stop(grace=2))
        await asyncio.sleep(0.7)  # longer than stop() waits for its last writes
        engine.answers.set()
        await stopping
        ended = [await engine.get(task.id) for task in tasks]
    finally:
        await engine.stop()
    tried("a stop during a claim of 5 tasks that takes 0.7 s", "5 given back, 0 attempts counted")
    assert [(task.status, task.attempts, task.crashes) for task in ended] == [
        (Status.QUEUED, 0, 0)
    ] * 5


async def test_a_claim_that_outlasts_the_grace_is_given_back_before_the_database_closes(
    tmp_path: Path, tried: Tried, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk takes 1.5 s for the claim's commit, and the worker waits 1 s for the claim."""
    engine = SQLite(tmp_path / "queue.db")
    await engine.start()
    queue = queue_of(engine, raise_mute, now=Clock())
    tasks = [await promise(queue, raise_mute) for _ in range(5)]
    commit = engine._commits._commit

    def commit_slowly(*arguments: Any) -> Any:
        results = commit(*arguments)
        time.sleep(1.5)
        return results

    monkeypatch.setattr(engine._commits, "_commit", commit_slowly)
    worker = Worker(queue, None, concurrency=5)
    await worker.start()
    await asyncio.sleep(0.05)
    monkeypatch.setattr(engine._commits, "_commit", commit)
    await worker.stop(grace=0)
    await engine.stop()
    async with opened(tmp_path / "queue.db") as engine:
        ended = [await engine.get(task.id) for task in tasks]
    tried("a stop with no grace during a claim of 5 tasks that takes 1.5 s", "5 re-queued")
    assert [(task.status, task.attempts, task.crashes) for task in ended] == [
        (Status.QUEUED, 0, 0)
    ] * 5


async def test_control_the_tasks_of_a_forgotten_claim_count_as_crashed(tmp_path: Path) -> None:
    async with opened(tmp_path / "queue.db") as engine:
        await put(engine, *(a_task() for _ in range(5)))
        await claim_all(engine, "a worker that forgets")
        now = NOW + LEASE + 1
        again = await recover(engine, "another worker", now=now)
    assert {task.crashes for task in again} == {1}


async def files_after_a_clean_up(
    directory: Path, monkeypatch: pytest.MonkeyPatch, *, known: bool
) -> int:
    """Clean up with a new database on a store with old files; return the number of files left.

    With `known`, the new database has a pending record of each file, as it has for its own uploads.
    """
    monkeypatch.setattr("app.tasks.clean_up.ABANDONED_SECONDS", 0.0)
    uploads = LocalStore(directory / "uploads")
    ids = [new_id(NOW) for _ in range(TASKS)]

    async def content() -> AsyncIterator[bytes]:
        yield b"Hello"

    for upload_id in ids:
        await uploads.receive(upload_id, content(), limit=5)
    for upload_id in ids[::2]:
        await uploads.publish(upload_id)
    async with opened(directory / "new.db") as engine:
        if known:
            records = tuple(Record(PENDING, "", uid, {"heartbeat": 0}, NOW) for uid in ids)
            await engine.put(Writes(records=records))
        kinds = registry(Settings(_env_file=None))
        queue = Queue(engine, kinds, RetryPolicy(), now=Clock())
        pending = PendingUploads(queue)
        tools: Any = type("Tools", (), {"engine": engine, "uploads": uploads})
        for _ in range(2):
            await clean_up(
                queue, uploads, pending, finished_before=NOW + DAY, failed_before=NOW + DAY
            )
            await Worker(queue, cast("Tools", tools)).run_until_idle()
    return len(files_below(directory / "uploads"))


async def test_the_files_of_another_database_on_the_same_store_are_spared(
    tmp_path: Path, tried: Tried, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = await files_after_a_clean_up(tmp_path, monkeypatch, known=False)
    tried(f"a clean-up beside {TASKS} files of another database", f"{TASKS - left} removed")
    assert left == TASKS


async def test_control_abandoned_files_of_this_database_are_removed(
    tmp_path: Path, tried: Tried, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So a clean-up that looked at the store alone would also have removed the other files."""
    left = await files_after_a_clean_up(tmp_path, monkeypatch, known=True)
    tried(f"a clean-up of {TASKS} abandoned files", f"{TASKS - left} removed")
    assert left == 0
