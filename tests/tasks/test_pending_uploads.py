"""An upload that began is committed or given up, and the database decides which of the two."""

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
    """A database, a process on it, and a store, which other databases may have too."""

    def __init__(self, queue: Queue[Tools], uploads: LocalStore) -> None:
        self.queue = queue
        self.uploads = uploads
        self.pending = PendingUploads(queue)

    async def receive(self, flight: AsyncExitStack) -> Record:
        """Begin an upload and receive its file; returns its record until it is committed."""

        async def content() -> AsyncIterator[bytes]:
            yield b"Hello"

        record = await flight.enter_async_context(self.pending.begin(new_id(NOW)))
        await self.uploads.receive(record.id, content(), limit=5)
        return record

    async def leave_behind(self) -> Record:
        """Receive a file as a request that ended without knowing what its commit did."""
        async with AsyncExitStack() as flight:
            return await self.receive(flight)

    async def commit(self, pending: Record) -> None:
        """Commit an upload, as its request does."""
        record = Record(COLLECTION, "", pending.id, {}, NOW)
        await self.queue.engine.put(Writes(records=(record,), removed=(pending,)))

    async def work(self) -> None:
        """Run the tasks that are queued."""
        tools: Any = type("Tools", (), {"engine": self.queue.engine, "uploads": self.uploads})
        await Worker(self.queue, cast("Tools", tools)).run_until_idle()


@pytest.fixture
async def place(tmp_path: Path) -> AsyncIterator[Place]:
    async with opened(tmp_path / "queue.db") as engine:
        queue = Queue(engine, registry(Settings(_env_file=None)), RetryPolicy(), now=lambda: NOW)
        yield Place(queue, LocalStore(tmp_path / "uploads"))


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        """Tell the time."""
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


async def test_an_abandoned_upload_is_removed_in_the_end(
    place: Place, clock: Clock, tmp_path: Path
) -> None:
    """With its record, and with a log line that names it."""
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


async def test_a_process_that_was_started_again_removes_what_the_one_before_left(
    place: Place, clock: Clock, tmp_path: Path
) -> None:
    await place.leave_behind()
    place.pending = PendingUploads(place.queue)
    await place.pending.remove_abandoned(HOUR)
    clock.now += HOUR
    await place.pending.remove_abandoned(HOUR)
    await place.work()
    assert files_below(tmp_path / "uploads") == []


async def test_more_are_removed_than_are_read_at_once(
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


async def test_of_a_commit_and_a_removal_at_the_same_time_one_comes_first(
    place: Place, clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Either the upload is committed and has its file, or neither is there."""
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


async def test_an_upload_that_was_committed_a_moment_ago_is_left_alone(
    place: Place, clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clean-up has read its record, and finds it gone when it removes it."""
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


async def test_an_upload_that_was_given_up_cannot_be_committed(place: Place, clock: Clock) -> None:
    """Its file is gone, so its client must not be answered 202."""
    record = await place.leave_behind()
    await place.pending.remove_abandoned(HOUR)
    clock.now += HOUR
    await place.pending.remove_abandoned(HOUR)
    with pytest.raises(RecordNotFound):
        await place.commit(record)


async def test_an_upload_in_flight_is_never_removed_by_its_own_process(
    place: Place, clock: Clock, tmp_path: Path
) -> None:
    """However long it takes, and however far the clock of the machine is set forward."""
    async with AsyncExitStack() as flight:
        record = await place.receive(flight)
        for _ in range(3):
            await place.pending.remove_abandoned(HOUR)
            clock.now += 24 * HOUR
        await place.work()
        await place.commit(record)
    assert files_below(tmp_path / "uploads") == [f"received/{record.id}"]


async def test_an_upload_in_flight_is_not_removed_by_another_process_while_its_own_lives(
    place: Place, clock: Clock, tmp_path: Path
) -> None:
    """It tells so by its heartbeats; without them, it is given up."""
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


async def test_a_short_upload_has_no_heartbeat(place: Place, clock: Clock) -> None:
    """Each is a commit."""
    async with AsyncExitStack() as flight:
        record = await place.receive(flight)
        clock.now += module.HEARTBEAT_SECONDS - 1
        await place.pending.write_heartbeats()
        listed = await place.queue.engine.read_record(module.COLLECTION, record.id, client="")
        assert listed == record


async def test_a_heartbeat_does_not_bring_back_the_record_of_a_committed_upload(
    place: Place, clock: Clock
) -> None:
    """Else the clean-up would queue the removal of what was committed."""
    async with AsyncExitStack() as flight:
        record = await place.receive(flight)
        await place.commit(record)
        clock.now += module.HEARTBEAT_SECONDS
        await place.pending.write_heartbeats()
    assert await pending_ids(place) == []


async def test_an_upload_that_ends_during_its_heartbeat_is_in_flight_no_more(
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


async def test_the_files_of_another_database_in_the_same_store_are_spared(
    place: Place, clock: Clock, tmp_path: Path
) -> None:
    """As after a move to PostgreSQL, or in a bucket that two services share."""
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


async def test_one_record_that_names_no_file_of_ours_leaves_the_others_to_be_removed(
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
