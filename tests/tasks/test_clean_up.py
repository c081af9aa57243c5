"""The clean-up removes old finished tasks. It keeps unfinished and new tasks."""

import asyncio
import errno
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from afterward import retention
from afterward.engine import Engine
from afterward.engines.sqlite.engine import SQLite
from afterward.errors import QueueUnavailable, TaskNotFound
from afterward.filter import TaskFilter
from afterward.queue import Queue
from afterward.retry import RetryPolicy
from afterward.task import Answer, Outcome, Status, Task, Writes, new_id
from app.settings import Settings
from app.tasks import clean_up as module
from app.tasks import registry
from app.tasks.clean_up import DAY, clean_up, clean_up_regularly
from app.tasks.pending_uploads import PendingUploads
from app.tasks.tools import Tools
from app.uploads.local import LocalStore
from app.uploads.store import StoreUnavailable
from tests.support.service import PATIENCE

pytestmark = pytest.mark.anyio

NOW = 1_750_000_000.0
WEEK = 7 * DAY
KEEP = {"keep_seconds": WEEK, "keep_failed_seconds": 30 * DAY}


@pytest.fixture
async def engine(tmp_path: Path) -> AsyncIterator[SQLite]:
    engine = SQLite(tmp_path / "queue.db")
    await engine.start()
    yield engine
    await engine.stop()


@pytest.fixture
def queue(engine: SQLite) -> Queue[Tools]:
    return Queue(engine, registry(Settings(_env_file=None)), RetryPolicy(), now=lambda: NOW)


@pytest.fixture
def uploads(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "uploads")


@pytest.fixture
def pending(queue: Queue[Tools]) -> PendingUploads:
    return PendingUploads(queue)


async def a_task(engine: Engine, status: Status, at: float) -> str:
    """Add a task that reached this status at this time, and return its id."""
    task = Task(
        id=new_id(at),
        kind="send_email",
        arguments="{}",
        created_at=at,
        updated_at=at,
        due_at=at,
        max_attempts=8,
    )
    await engine.put(Writes(tasks=(task,)))
    if status is Status.CANCELLED:
        await engine.cancel(task.id, at)
    elif status is not Status.QUEUED:
        claim = await engine.claim("worker", kinds=["send_email"], limit=1, now=at, lease=30)
        (claimed,) = claim.running
        if status is not Status.RUNNING:
            due_at = at + 1 if status is Status.RETRYING else None
            await engine.settle(claimed, Outcome(status, due_at=due_at), at)
    return task.id


async def exists(engine: Engine, task_id: str) -> bool:
    try:
        await engine.get(task_id)
    except TaskNotFound:
        return False
    return True


@pytest.mark.parametrize(
    ("status", "stays"),
    [
        (Status.SUCCEEDED, False),
        (Status.FAILED, False),
        (Status.CANCELLED, False),
        (Status.QUEUED, True),
        (Status.RUNNING, True),
        (Status.RETRYING, True),
    ],
)
async def test_after_the_retention_time_finished_tasks_are_removed_and_unfinished_tasks_stay(
    queue: Queue[Tools],
    uploads: LocalStore,
    pending: PendingUploads,
    status: Status,
    *,
    stays: bool,
) -> None:
    old = await a_task(queue.engine, status, NOW - WEEK - 1)
    await clean_up(queue, uploads, pending, finished_before=NOW - WEEK, failed_before=NOW - WEEK)
    assert await exists(queue.engine, old) is stays


async def test_within_the_retention_time_finished_tasks_stay(
    queue: Queue[Tools], uploads: LocalStore, pending: PendingUploads
) -> None:
    recent = await a_task(queue.engine, Status.SUCCEEDED, NOW - WEEK + 1)
    await clean_up(queue, uploads, pending, finished_before=NOW - WEEK, failed_before=NOW - WEEK)
    assert await exists(queue.engine, recent)


async def test_old_tasks_are_removed_in_several_transactions(
    queue: Queue[Tools],
    uploads: LocalStore,
    pending: PendingUploads,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = queue.engine
    monkeypatch.setattr(retention, "AT_ONCE", 2)
    for _ in range(5):
        await a_task(engine, Status.CANCELLED, NOW - WEEK - 1)
    with capture_logs() as lines:
        await clean_up(
            queue, uploads, pending, finished_before=NOW - WEEK, failed_before=NOW - WEEK
        )
    assert await engine.list_tasks(TaskFilter(), limit=10) == []
    assert [(line["event"], line["rows"]) for line in lines] == [("old tasks removed", 5)]


@pytest.mark.parametrize(("age", "stays"), [(DAY - 1, True), (DAY + 1, False)])
async def test_answers_to_idempotency_keys_are_removed_after_a_day(
    queue: Queue[Tools], uploads: LocalStore, pending: PendingUploads, age: float, *, stays: bool
) -> None:
    engine = queue.engine
    await engine.put(Writes(answer=Answer("key", "fingerprint", "{}", "", NOW - age)))
    await clean_up(queue, uploads, pending, finished_before=NOW - WEEK, failed_before=NOW - WEEK)
    removed = await engine.purge(
        finished_before=0, failed_before=0, answered_before=NOW + 1, limit=10
    )
    assert removed == (1 if stays else 0)


# Failures of a clean-up


async def test_a_failed_step_is_logged_and_the_next_steps_run(
    queue: Queue[Tools],
    uploads: LocalStore,
    pending: PendingUploads,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """This holds for every error, so a bad file or row does not block the clean-up of the rest."""
    done = list[str]()

    def failing(name: str, error: Exception) -> Callable[..., Awaitable[int]]:
        async def fail(**_: float) -> int:
            done.append(name)
            raise error

        return fail

    monkeypatch.setattr(pending, "write_heartbeats", failing("heartbeats", QueueUnavailable()))
    monkeypatch.setattr(queue.engine, "purge", failing("purge", ValueError("one bad row")))
    unavailable = StoreUnavailable()
    unavailable.__cause__ = PermissionError(errno.EACCES, "Permission denied", "/srv/uploads")
    monkeypatch.setattr(uploads, "sweep", failing("sweep", unavailable))
    monkeypatch.setattr(pending, "remove_abandoned", failing("abandoned", QueueUnavailable()))
    with capture_logs() as lines:
        await clean_up(
            queue, uploads, pending, finished_before=NOW - WEEK, failed_before=NOW - WEEK
        )
    assert done == ["heartbeats", "purge", "sweep", "abandoned"]
    events = [line["event"] for line in lines]
    assert events == ["clean-up put off", "clean-up failed", *["clean-up put off"] * 2]
    assert lines[2]["reason"].startswith("EACCES: Permission denied: /srv/uploads")


async def test_a_postponed_step_is_done_at_the_next_clean_up(
    queue: Queue[Tools],
    uploads: LocalStore,
    pending: PendingUploads,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "EVERY_SECONDS", 0.01)
    engine = queue.engine
    old = await a_task(engine, Status.CANCELLED, NOW - WEEK - 1)
    purge, refusals = engine.purge, iter([QueueUnavailable(), QueueUnavailable()])

    async def reluctant(**options: float) -> int:
        for refusal in refusals:
            raise refusal
        return await purge(**options)  # type: ignore[arg-type]

    monkeypatch.setattr(engine, "purge", reluctant)
    with capture_logs() as lines:
        cleaning = asyncio.create_task(clean_up_regularly(queue, uploads, pending, **KEEP))
        async with asyncio.timeout(PATIENCE):
            while await exists(engine, old):  # noqa: ASYNC110 -- a test may poll
                await asyncio.sleep(0.01)
        cleaning.cancel()
    assert [line["event"] for line in lines].count("clean-up put off") == 2


async def test_a_cancellation_that_the_driver_hides_ends_the_clean_up(
    queue: Queue[Tools],
    uploads: LocalStore,
    pending: PendingUploads,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The driver of a database may turn the cancellation into a timeout of its own."""
    asked = asyncio.Event()

    async def purge(**_: object) -> int:
        asked.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            raise QueueUnavailable from None
        return 0

    monkeypatch.setattr(queue.engine, "purge", purge)
    cleaning = asyncio.create_task(clean_up_regularly(queue, uploads, pending, **KEEP))
    await asyncio.wait_for(asked.wait(), PATIENCE)
    cleaning.cancel()
    await asyncio.wait([cleaning], timeout=PATIENCE)
    assert cleaning.cancelled()
