"""Pending uploads: each upload is either committed or removed, and the database decides which."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, cast

import pytest
from structlog.testing import capture_logs

from afterward.errors import RecordNotFound
from afterward.queue import Queue
from afterward.retry import RetryPolicy
from afterward.task import Record, Writes, new_id
from afterward.unit_of_work import UnitOfWork
from afterward.worker import Worker
from app.settings import Settings
from app.tasks import pending_uploads as module
from app.tasks import registry
from app.tasks.pending_uploads import PendingUploads
from app.tasks.tools import Tools
from app.tasks.uploads import COLLECTION
from app.uploads.local import LocalStore
from tests.library.support import opened
from tests.support.service import files_below

pytestmark = pytest.mark.anyio

NOW = 1_750_000_000.0
HOUR = 3600.0


class Place:
    """A process with a database, and a store that other databases may share."""

    def __init__(self, queue: Queue[Tools], uploads: LocalStore) -> None:
        self.queue = queue
        self.uploads = uploads
        self.pending = PendingUploads(queue)

    async def receive(self, flight: AsyncExitStack) -> Record:
        """Begin an upload, receive its file, and return its pending record."""

        async def content() -> AsyncIterator[bytes]:
            yield b"Hello"

        record = await flight.enter_async_context(self.pending.begin(new_id(NOW)))
        await self.uploads.receive(record.id, content(), limit=5)
        return record

    async def leave_behind(self) -> Record:
        """Receive a file for a request that ends before it learns the result of its commit."""
        async with AsyncExitStack() as flight:
            return await self.receive(flight)

    async def commit(self, pending: Record) -> None:
        """Commit an upload as its request does."""
        record = Record(COLLECTION, "", pending.id, {}, NOW)
        await self.queue.engine.put(Writes(records=(record,), removed=(pending,)))

    async def work(self) -> None:
        """Run the queued tasks."""
        tools: Any = type("Tools", (), {"engine": self.queue.engine, "uploads": self.uploads})
        await Worker(self.queue, cast("Tools", tools)).run_until_idle()


@pytest.fixture
async def place(tmp_path: Path) -> AsyncIterator[Place]:
    async with opened(tmp_path / "queue.db") as engine:
        queue = Queue(engine, registry(Settings(_env_file=None)), RetryPolicy(), now=lambda: NOW)
        yield Place(queue, LocalStore(tmp_path / "uploads"))


class Clock:
    """A monotonic clock that a test advances."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        """Return the time in seconds."""
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


async def pending_ids(place: Place) -> list[str]:
    records = await place.queue.engine.list_records(
        module.COLLECTION, client="", after=None, limit=100
    )
    return [record.id for record in records]


async def test_an_abandoned_upload_is_removed_after_an_hour(
    place: Place, clock: Clock, tmp_path: Path
) -> None:
    """Its pending record is removed as well, and a log line has its id."""
    record = await place.leave_behind()
    await place.pending.remove_abandoned(HOUR)
    clock.now += HOUR - 1
    await place.pending.remove_abandoned(HOUR)
    await place.work()
    assert files_below(tmp_path / "uploads") == [f"received/{record.id}"]
    clock.now += 1
    with capture_logs() as lines:
        await place.pending.remove_abandoned(HOUR)
        await place.work()
    assert files_below(tmp_path / "uploads") == []
    assert await pending_ids(place) == []
    named = [line["event"] for line in lines if line.get("upload_id") == record.id]
    assert named == ["abandoned upload is removed", "upload removed"]


async def test_a_restarted_process_removes_the_abandoned_uploads_of_the_previous_process(
    place: Place, clock: Clock, tmp_path: Path
) -> None:
    await place.leave_behind()
    place.pending = PendingUploads(place.queue)
    await place.pending.remove_abandoned(HOUR)
    clock.now += HOUR
    await place.pending.remove_abandoned(HOUR)
    await place.work()
    assert files_below(tmp_path / "uploads") == []


async def test_abandoned_uploads_of_several_pages_are_removed(
    place: Place, clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PAGE", 2)
    for _ in range(5):
        await place.leave_behind()
    await place.pending.remove_abandoned(HOUR)
    clock.now += HOUR
    await place.pending.remove_abandoned(HOUR)
    await place.work()
    assert files_below(tmp_path / "uploads") == []


async def test_a_commit_and_a_removal_at_the_same_time_exclude_each_other(
    place: Place, clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Either the upload is committed and has its file, or it has neither record nor file."""
    record = await place.leave_behind()
    await place.pending.remove_abandoned(HOUR)
    clock.now += HOUR
    collect = place.queue.collect
    committing = list[asyncio.Task[None]]()

    def committed_meanwhile(*owner: Any) -> UnitOfWork[Tools]:
        committing.append(asyncio.create_task(place.commit(record)))
        return collect(*owner)

    with monkeypatch.context() as patch:
        patch.setattr(place.queue, "collect", committed_meanwhile)
        await place.pending.remove_abandoned(HOUR)
    (outcome,) = await asyncio.gather(*committing, return_exceptions=True)
    await place.work()
    was_committed = outcome is None
    assert was_committed or isinstance(outcome, RecordNotFound)
    assert len(files_below(tmp_path / "uploads")) == was_committed


async def test_an_upload_committed_after_the_clean_up_read_its_record_stays(
    place: Place, clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clean-up cannot remove the pending record, because the commit has removed it already."""
    record = await place.leave_behind()
    await place.pending.remove_abandoned(HOUR)
    clock.now += HOUR
    listed = await place.queue.engine.list_records(
        module.COLLECTION, client="", after=None, limit=9
    )
    await place.commit(record)
    pages = iter([listed, []])

    async def as_listed_before(*_: object, **__: object) -> list[Record]:
        return next(pages)

    monkeypatch.setattr(place.queue.engine, "list_records", as_listed_before)
    with capture_logs() as lines:
        await place.pending.remove_abandoned(HOUR)
        await place.work()
    assert files_below(tmp_path / "uploads") == [f"received/{record.id}"]
    assert lines == []


async def test_an_upload_that_the_clean_up_removed_cannot_be_committed(
    place: Place, clock: Clock
) -> None:
    """Its file is gone, so its client must not get a 202."""
    record = await place.leave_behind()
    await place.pending.remove_abandoned(HOUR)
    clock.now += HOUR
    await place.pending.remove_abandoned(HOUR)
    with pytest.raises(RecordNotFound):
        await place.commit(record)


async def test_an_upload_in_flight_is_never_removed_by_its_own_process(
    place: Place, clock: Clock, tmp_path: Path
) -> None:
    """This holds for any duration of the upload, and for any jump of the clock."""
    async with AsyncExitStack() as flight:
        record = await place.receive(flight)
        for _ in range(3):
            await place.pending.remove_abandoned(HOUR)
            clock.now += 24 * HOUR
        await place.work()
        await place.commit(record)
    assert files_below(tmp_path / "uploads") == [f"received/{record.id}"]


async def test_an_upload_in_flight_is_not_removed_by_another_process_while_it_has_heartbeats(
    place: Place, clock: Clock, tmp_path: Path
) -> None:
    """Without heartbeats for an hour, the other process removes it."""
    other = PendingUploads(place.queue)
    async with AsyncExitStack() as flight:
        await place.receive(flight)
        for _ in range(30):
            await place.pending.write_heartbeats()
            await other.remove_abandoned(HOUR)
            clock.now += HOUR / 2
        await place.work()
        assert len(files_below(tmp_path / "uploads")) == 1
        clock.now += HOUR
        await other.remove_abandoned(HOUR)
        await place.work()
        assert files_below(tmp_path / "uploads") == []


async def test_a_short_upload_writes_no_heartbeat(place: Place, clock: Clock) -> None:
    """Each heartbeat costs a commit."""
    async with AsyncExitStack() as flight:
        record = await place.receive(flight)
        clock.now += module.HEARTBEAT_SECONDS - 1
        await place.pending.write_heartbeats()
        listed = await place.queue.engine.read_record(module.COLLECTION, record.id, client="")
        assert listed == record


async def test_a_heartbeat_does_not_restore_the_pending_record_of_a_committed_upload(
    place: Place, clock: Clock
) -> None:
    """With the record restored, the clean-up would queue the removal of the committed upload."""
    async with AsyncExitStack() as flight:
        record = await place.receive(flight)
        await place.commit(record)
        clock.now += module.HEARTBEAT_SECONDS
        await place.pending.write_heartbeats()
    assert await pending_ids(place) == []


async def test_an_upload_that_ends_during_its_heartbeat_is_no_longer_in_flight(
    place: Place, clock: Clock
) -> None:
    async with AsyncExitStack() as flight:
        await place.receive(flight)
        clock.now += module.HEARTBEAT_SECONDS
        beating = asyncio.create_task(place.pending.write_heartbeats())
        await asyncio.sleep(0)
    await beating
    await place.pending.remove_abandoned(HOUR)
    clock.now += HOUR
    await place.pending.remove_abandoned(HOUR)
    assert await pending_ids(place) == []


async def test_the_files_of_another_database_in_the_same_store_are_kept(
    place: Place, clock: Clock, tmp_path: Path
) -> None:
    """For example after a move to PostgreSQL, or in a bucket that two services share."""
    record = await place.leave_behind()
    promised = await place.leave_behind()
    await place.commit(promised)
    async with opened(tmp_path / "new.db") as engine:
        new = Place(
            Queue(engine, registry(Settings(_env_file=None)), RetryPolicy(), now=lambda: NOW),
            place.uploads,
        )
        for _ in range(3):
            await new.pending.remove_abandoned(HOUR)
            await new.work()
            clock.now += 24 * HOUR
    spared = {f"received/{record.id}", f"received/{promised.id}"}
    assert set(files_below(tmp_path / "uploads")) == spared


async def test_a_record_with_an_invalid_id_does_not_block_the_removal_of_other_uploads(
    place: Place, clock: Clock, tmp_path: Path
) -> None:
    await place.queue.engine.put(Writes(records=(Record(module.COLLECTION, "", "zzz", {}, NOW),)))
    await place.leave_behind()
    await place.pending.remove_abandoned(HOUR)
    clock.now += HOUR
    await place.pending.remove_abandoned(HOUR)
    await place.work()
    assert files_below(tmp_path / "uploads") == []
    assert await pending_ids(place) == []
