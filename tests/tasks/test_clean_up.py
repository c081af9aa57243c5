"""What is finished and old is removed; what is owed, or new, stays."""

import asyncio
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from app.files.local import LocalStore
from app.queue.errors import QueueUnavailable, TaskNotFound
from app.queue.sqlite import SQLite
from app.queue.task import Answer, Outcome, Record, Status, Task, Writes, new_id
from app.tasks import clean_up as module
from app.tasks.clean_up import ABANDONED_SECONDS, DAY, clean_up, clean_up_regularly
from app.tasks.uploads import COLLECTION

pytestmark = pytest.mark.anyio

NOW = 1_750_000_000.0
WEEK = 7 * DAY


@pytest.fixture
async def engine(tmp_path: Path) -> AsyncIterator[SQLite]:
    engine = SQLite(tmp_path / "queue.db")
    await engine.start()
    yield engine
    await engine.stop()


@pytest.fixture
def uploads(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "uploads")


async def a_task(engine: SQLite, status: Status, at: float) -> str:
    """Put a task that came to this status at this time; returns its id."""
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
        (claimed,) = await engine.claim("worker", kinds=["send_email"], limit=1, now=at, lease=30)
        if status is not Status.RUNNING:
            due_at = at + 1 if status is Status.RETRYING else None
            await engine.settle(claimed, Outcome(status, due_at=due_at), at)
    return task.id


async def is_there(engine: SQLite, task_id: str) -> bool:
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
async def test_after_the_retention_what_is_finished_goes_and_what_is_owed_stays(
    engine: SQLite, uploads: LocalStore, status: Status, *, stays: bool
) -> None:
    old = await a_task(engine, status, NOW - WEEK - 1)
    await clean_up(engine, uploads, finished_before=NOW - WEEK, now=NOW)
    assert await is_there(engine, old) is stays


async def test_within_the_retention_everything_stays(engine: SQLite, uploads: LocalStore) -> None:
    recent = await a_task(engine, Status.SUCCEEDED, NOW - WEEK + 1)
    await clean_up(engine, uploads, finished_before=NOW - WEEK, now=NOW)
    assert await is_there(engine, recent)


async def test_more_is_removed_than_goes_into_one_transaction(
    engine: SQLite, uploads: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "AT_ONCE", 2)
    for _ in range(5):
        await a_task(engine, Status.CANCELLED, NOW - WEEK - 1)
    with capture_logs() as lines:
        await clean_up(engine, uploads, finished_before=NOW - WEEK, now=NOW)
    assert await engine.list_tasks(client="", status=None, kind=None, after=None, limit=10) == []
    assert [(line["event"], line["rows"]) for line in lines] == [("old tasks removed", 5)]


@pytest.mark.parametrize(("age", "stays"), [(DAY - 1, True), (DAY + 1, False)])
async def test_answers_to_idempotency_keys_go_after_a_day(
    engine: SQLite, uploads: LocalStore, age: float, *, stays: bool
) -> None:
    await engine.put(Writes(answer=Answer("key", "fingerprint", "{}", "", NOW - age)))
    await clean_up(engine, uploads, finished_before=NOW - WEEK, now=NOW)
    removed = await engine.purge(finished_before=0, answered_before=NOW + 1, limit=10)
    assert removed == (1 if stays else 0)


# Uploads that nobody was told of.


async def an_upload(uploads: LocalStore, directory: Path, age: float) -> str:
    """Receive a file as if that had been so many seconds ago; returns its id."""

    async def content() -> AsyncIterator[bytes]:
        yield b"Hello"

    upload_id = new_id(time.time())
    await uploads.receive(upload_id, content(), limit=5)
    then = time.time() - age
    os.utime(directory / "uploads" / "received" / upload_id, (then, then))
    return upload_id


@pytest.mark.parametrize(
    ("age", "recorded", "left"),
    [
        (ABANDONED_SECONDS + 60, False, []),
        (ABANDONED_SECONDS + 60, True, ["received"]),
        (ABANDONED_SECONDS - 60, False, ["received"]),
    ],
    ids=["old and unknown", "old and known", "new"],
)
async def test_an_upload_without_a_record_is_removed_in_the_end(
    engine: SQLite,
    uploads: LocalStore,
    tmp_path: Path,
    age: float,
    left: list[str],
    *,
    recorded: bool,
) -> None:
    upload_id = await an_upload(uploads, tmp_path, age)
    if recorded:
        await engine.put(Writes(records=(Record(COLLECTION, "", upload_id, {}, NOW),)))
    await clean_up(engine, uploads, finished_before=NOW - WEEK, now=NOW)
    files = [path for path in (tmp_path / "uploads").rglob("*") if path.is_file()]
    assert [path.parent.name for path in files] == left


# Again and again.


async def test_what_cannot_be_done_now_is_done_next_time(
    engine: SQLite, uploads: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "EVERY_SECONDS", 0.01)
    old = await a_task(engine, Status.CANCELLED, NOW - WEEK - 1)
    purge, refusals = engine.purge, iter([QueueUnavailable(), QueueUnavailable()])

    async def reluctant(**options: float) -> int:
        for refusal in refusals:
            raise refusal
        return await purge(**options)  # type: ignore[arg-type]

    monkeypatch.setattr(engine, "purge", reluctant)
    with capture_logs() as lines:
        cleaning = asyncio.create_task(
            clean_up_regularly(engine, uploads, retention_days=7, now=lambda: NOW)
        )
        async with asyncio.timeout(5):
            while await is_there(engine, old):  # noqa: ASYNC110 -- a test may poll
                await asyncio.sleep(0.01)
        cleaning.cancel()
    assert [line["event"] for line in lines].count("clean-up put off") == 2
