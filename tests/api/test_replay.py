"""The replay of missed changes: which ids can be replayed, and how clients share a read."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest

from afterward.errors import QueueUnavailable
from afterward.events import Event, EventType
from afterward.task import Task
from app.api import replay as replay_module
from app.api.event_stream import Change, EventStream, event_id
from app.api.replay import Replay
from app.api.routes import tasks as routes
from app.api.server_sent_events import EventStreamResponse
from tests.api.streams import Connection, SlowConnection, events_in, eventually, served

pytestmark = pytest.mark.anyio
NOW = 1_700_000_000.5
KEPT = 1000.0
LAST = "1699999990.250000-1"


def a_task(task_id: str, at: float = NOW) -> Task:
    return Task(id=task_id, kind="work", arguments="", created_at=NOW, updated_at=at, due_at=NOW)


@dataclass
class Record:
    """The part of an engine that a replay uses. Reads wait while `gate` is closed."""

    tasks: Sequence[Task] | None = ()
    error: Exception | None = None
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    is_read: asyncio.Event = field(default_factory=asyncio.Event)
    reads: list[tuple[str, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Open the gate."""
        self.gate.set()

    async def list_changed(
        self, client: str, *, since: float, now: float, limit: int
    ) -> Sequence[Task] | None:
        """Return the tasks, or raise the error, when the gate is open."""
        assert (now, limit) == (NOW, replay_module.MOST_CHANGES)
        self.reads.append((client, since))
        self.is_read.set()
        await self.gate.wait()
        if self.error is not None:
            raise self.error
        return self.tasks


def replay_of(record: Any) -> Replay:
    return Replay(record, lambda: NOW, KEPT)


async def missed(
    replay: Replay, last_event_id: str = LAST, client: str = "ada"
) -> list[str] | None:
    changes = await replay.read_missed(client, last_event_id)
    return None if changes is None else [change.task_id for change in changes]


async def test_the_record_is_read_from_a_few_seconds_before_the_event() -> None:
    """Clocks differ, and a change is committed after its time. The event itself is left out."""
    record = Record([a_task("1", 1699999990.25), a_task("2")])
    assert await missed(replay_of(record)) == ["2"]
    assert record.reads == [("ada", 1699999985)]


@pytest.mark.parametrize(
    "last_event_id",
    [
        "",
        "1",
        "1699999990-1",
        "nan-1",
        "inf-1",
        "-1699999990.250000-1",
        "1699999990.250000",
        "１699999990.250000-1",  # noqa: RUF001 - a digit, but not of ASCII
        "1699999990.250000-\xe9",
        "1699999990.250000-" + "x" * 65,
        "16999999902500000000000000000.000000-1",
    ],
)
async def test_an_id_of_another_form_cannot_be_replayed(last_event_id: str) -> None:
    record = Record()
    assert await missed(replay_of(record), last_event_id) is None
    assert record.reads == []


@pytest.mark.parametrize(
    ("away", "is_replayed"), [(-5.1, False), (-4.9, True), (999.0, True), (1001.0, False)]
)
async def test_the_time_of_an_id_is_within_the_retention_and_not_in_the_future(
    away: float, is_replayed: bool
) -> None:
    """Retention may have removed older tasks. A time in the future means that a clock was set."""
    changes = await missed(replay_of(Record()), f"{NOW - away:.6f}-")
    assert changes == ([] if is_replayed else None)


async def test_nothing_is_replayed_if_there_are_too_many_changes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert await missed(replay_of(Record(None))) is None
    many = [a_task(str(number)) for number in range(250)]
    assert await missed(replay_of(Record(many))) == [task.id for task in many]
    monkeypatch.setattr(replay_module, "MOST_BYTES", 1000)
    small = iter([Change("", "", NOW, finished=False, data=bytes(100))] * 11)
    monkeypatch.setattr(Change, "of", lambda _: next(small))  # no more than are over the limit
    assert await missed(replay_of(Record(many))) is None


async def test_nothing_is_replayed_if_the_record_cannot_be_read() -> None:
    record = Record(error=QueueUnavailable())
    replay = replay_of(record)
    assert await missed(replay) is None
    record.error = None
    assert await missed(replay) == []


async def test_clients_do_not_wait_for_a_record_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second client waits for the read of the first one. Later clients get a read again."""
    monkeypatch.setattr(replay_module, "MOST_SECONDS", 0.05)
    record = Record([a_task("1")])
    replay = replay_of(record)
    record.gate.clear()
    both = await asyncio.gather(missed(replay), missed(replay, client="grace"))
    assert list(both) == [None, None]
    record.gate.set()
    both = await asyncio.gather(missed(replay), missed(replay, client="grace"))
    assert list(both) == [["1"], ["1"]]
    assert replay._waiting == {}


async def test_clients_that_return_to_about_the_same_time_share_a_read() -> None:
    """A client that returns during a read waits for the next one, with all that come by then."""
    record = Record([a_task("2")])
    replay = replay_of(record)
    record.gate.clear()
    first = asyncio.create_task(missed(replay))
    await record.is_read.wait()
    others = [asyncio.create_task(missed(replay, f"1699999990.{n}00000-1")) for n in range(9)]
    other_client = asyncio.create_task(missed(replay, client="grace"))
    await asyncio.sleep(0)
    record.gate.set()
    told = await asyncio.gather(first, *others, other_client)
    assert told == [["2"]] * 11
    assert record.reads == [("ada", 1699999985)] * 2 + [("grace", 1699999985)]


async def test_a_client_that_disconnects_does_not_take_the_read_from_the_others() -> None:
    record = Record([a_task("2")])
    replay = replay_of(record)
    record.gate.clear()
    leaves, stays = (asyncio.create_task(missed(replay)) for _ in range(2))
    await record.is_read.wait()
    leaves.cancel()
    await asyncio.wait([leaves])
    record.gate.set()
    assert await stays == ["2"]
    assert len(record.reads) == 1


async def test_clients_share_the_changes_that_wait_to_be_sent() -> None:
    """So many clients that return to different times, and do not read, hold little memory."""
    replay = replay_of(Record([a_task("1"), a_task("2")]))
    first = await replay.read_missed("ada", "1699999980.000000-")
    second = await replay.read_missed("ada", "1699999990.000000-")
    assert first
    assert second
    assert all(a is b for a, b in zip(first, second, strict=True))
    assert len(replay._in_use) == 2
    del first, second
    assert len(replay._in_use) == 0


async def test_readers_catch_up_when_events_of_other_processes_may_have_been_lost() -> None:
    """Readers of single tasks need nothing, because their streams read the task now and then."""
    event_stream = EventStream()
    replay = replay_of(Record([a_task("1", NOW - 2), a_task("2", NOW - 1)]))
    with event_stream.reader("ada") as reader, event_stream.reader("ada", "1"):
        waiting = asyncio.create_task(anext(reader))
        replay.catch_up(event_stream, NOW - 3)
        assert [change.task_id for change in await waiting] == ["1", "2"]
        await asyncio.gather(*replay._catching_up)
    assert replay._catching_up == set()


async def test_a_quiet_stream_goes_on_after_a_catch_up_that_finds_nothing() -> None:
    event_stream = EventStream()
    replay = replay_of(Record())
    with event_stream.reader("") as reader:
        waiting = asyncio.create_task(anext(reader))
        replay.catch_up(event_stream, NOW - 3)
        await asyncio.wait(replay._catching_up)
        await asyncio.sleep(0)
        event_stream.publish(Event(EventType.STARTED, a_task("1")))
        assert [change.task_id for change in await waiting] == ["1"]


async def test_a_client_that_cannot_catch_up_returns_to_the_lost_events() -> None:
    """The `gap` does not have the id of an event that came later, from this process."""
    async with catching_up(NOW - 60, Record(None)) as (replay, _, connection):
        await asyncio.wait(replay._catching_up)
    (local, gap) = events_in(connection.text)
    assert (local.id, gap.event) == (f"{NOW:.6f}-local", "gap")
    assert "could not read the record" in gap.data["detail"]
    lost = Record([a_task("lost", NOW - 58)])
    assert await missed(replay_of(lost), gap.id, "") == ["lost"]
    assert lost.reads == [("", int(NOW - 65))]


@pytest.mark.parametrize("is_read", [True, False], ids=["before it is sent", "before it is read"])
async def test_a_client_returns_to_the_lost_events_if_the_service_stops(is_read: bool) -> None:
    """The last block of the stream has an id from before the lost events, and no data."""
    record = Record([a_task("lost", NOW - 58)])
    record.gate.clear()
    async with catching_up(NOW - 60, record) as (replay, event_stream, connection):
        await record.is_read.wait()
        if is_read:
            record.gate.set()
            await asyncio.wait(replay._catching_up)
        event_stream.close()
    assert connection.text.endswith(f"\n\nid: {NOW - 60:.6f}-\n\n")


async def test_a_catch_up_that_succeeds_does_not_hide_that_a_later_one_fails() -> None:
    """The two gaps follow each other so soon that both wait for the record."""
    event_stream, answers = EventStream(), iter([(), None])

    class Record:
        async def list_changed(self, *_: object, **__: object) -> Sequence[Task] | None:
            return next(answers)

    replay = replay_of(Record())
    with event_stream.reader("") as reader:
        reader.last_id = event_id(NOW)
        replay.catch_up(event_stream, NOW - 60)
        replay.catch_up(event_stream, NOW - 30)
        await asyncio.wait(replay._catching_up)
        assert reader.fell_behind
        assert reader.position == event_id(NOW - 30)


class RecordInTurn:
    """Answers each read when the test says so."""

    def __init__(self) -> None:
        self.answers: asyncio.Queue[Sequence[Task] | Exception] = asyncio.Queue()

    async def list_changed(self, *_: object, **__: object) -> Sequence[Task]:
        """Return the answer, or raise the error."""
        answer = await self.answers.get()
        if isinstance(answer, Exception):
            raise answer
        return answer


async def test_a_stop_during_the_second_of_two_catch_ups_hides_no_lost_change() -> None:
    """The first one is given, and an event of this process comes, which must not count as read."""
    event_stream, record = EventStream(), RecordInTurn()
    replay = replay_of(record)
    with event_stream.reader("") as reader:
        reader.last_id = event_id(NOW - 10)
        replay.catch_up(event_stream, NOW - 60)
        replay.catch_up(event_stream, NOW - 30)
        record.answers.put_nowait([a_task("first", NOW - 20)])
        assert [change.task_id for change in await anext(reader)] == ["first"]
        event_stream.publish(Event(EventType.STARTED, a_task("local")))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(anext(reader), 0.05)
        event_stream.close()
        event_stream.publish(Event(EventType.SUCCEEDED, a_task("ended during the stop")))
        assert await anext(reader, None) is None
        assert reader.position == event_id(NOW - 30)
    record.answers.put_nowait([])
    await asyncio.gather(*replay._catching_up)


async def test_a_change_that_comes_while_the_record_is_read_is_sent_after_it() -> None:
    """The row may be older than the change: else a client would end with the older one."""
    event_stream, record = EventStream(), RecordInTurn()
    replay = replay_of(record)
    with event_stream.reader("") as reader:
        replay.catch_up(event_stream, NOW - 60)
        waiting = asyncio.create_task(anext(reader))
        await asyncio.sleep(0.01)
        event_stream.publish(Event(EventType.SUCCEEDED, a_task("1", NOW)))
        record.answers.put_nowait([a_task("1", NOW - 1)])
        given = [*await waiting, *await anext(reader)]
    assert [change.updated_at for change in given] == [NOW - 1, NOW]


async def test_an_older_row_of_a_second_replay_is_left_out() -> None:
    """Clients share reads, so a replay that is given later may have been read earlier."""
    with EventStream().reader("") as reader:
        first, second = (reader.expect_replay(event_id(NOW - at)) for at in (90, 60))
        second([Change.of(a_task("1", NOW - 2)), Change.of(a_task("2", NOW - 1))])
        first([Change.of(a_task("1", NOW - 1))])
        given = [*await anext(reader), *await anext(reader)]
    assert [change.id for change in given] == [event_id(NOW - 1, "1"), event_id(NOW - 1, "2")]
    assert reader.last_id == event_id(NOW - 1, "2")


async def test_a_catch_up_that_ends_before_the_client_s_own_replay_is_no_gap() -> None:
    event_stream, record = EventStream(), RecordInTurn()
    replay = replay_of(record)
    connection = Connection()
    write = partial(routes._write_all_events, replay, "", event_id(NOW - 90))
    async with served(EventStreamResponse(event_stream.reader(""), write), connection):
        await eventually(replay._turn.locked)
        replay.catch_up(event_stream, NOW - 60)
        record.answers.put_nowait([a_task("own", NOW - 80)])
        record.answers.put_nowait([a_task("lost", NOW - 50)])
        await eventually(lambda: "lost" in connection.text)
        event_stream.close()
    assert [event.id for event in events_in(connection.text)] == [
        event_id(NOW - 80, "own"),
        event_id(NOW - 50, "lost"),
    ]


async def test_an_unexpected_error_in_a_read_is_a_gap_for_that_client_alone() -> None:
    event_stream, record = EventStream(), RecordInTurn()
    replay = replay_of(record)
    with event_stream.reader("ada") as ada, event_stream.reader("eve") as eve:
        replay.catch_up(event_stream, NOW - 60)
        record.answers.put_nowait(LookupError("a bug"))
        record.answers.put_nowait([a_task("1", NOW - 1)])
        await asyncio.gather(*replay._catching_up)
        assert ada.fell_behind
        assert [change.task_id for change in await anext(eve)] == ["1"]


@asynccontextmanager
async def catching_up(
    lost_since: float, record: Record
) -> AsyncIterator[tuple[Replay, EventStream, Connection]]:
    """Serve a stream that catches up, after it has sent an event of this process.

    Its client reads the later events only when the block ends.
    """
    replay, event_stream, connection = replay_of(record), EventStream(), SlowConnection(blocks=3)
    write = partial(routes._write_all_events, replay, "", None)
    async with served(EventStreamResponse(event_stream.reader(""), write), connection):
        event_stream.publish(Event(EventType.STARTED, a_task("local")))
        await eventually(lambda: "local" in connection.text)
        replay.catch_up(event_stream, lost_since)
        yield replay, event_stream, connection
        connection.reads_again.set()


async def test_readers_are_told_of_a_gap_if_they_cannot_catch_up() -> None:
    event_stream = EventStream()
    replay = replay_of(Record(None))
    with event_stream.reader("ada") as reader:
        replay.catch_up(event_stream, NOW - 3)
        assert await anext(reader, None) is None
        assert reader.fell_behind
        assert event_stream.clients == []


async def test_a_reader_that_has_not_read_its_last_replays_falls_behind() -> None:
    """So gaps that follow each other do not fill the memory, while a client does not read."""
    event_stream = EventStream()
    with event_stream.reader("ada") as reader:
        reader.last_id = event_id(NOW)
        for gap in range(4):
            give = event_stream.expect_replay("ada", event_id(NOW - 60 + gap))
            if gap == 3:
                reader.add(Change.of(a_task("later")))
            give([Change.of(a_task("1"))])
            assert reader.fell_behind is (gap == 3)
        assert event_stream.clients == []
        assert await anext(reader, None) is None
        assert reader.position == event_id(NOW - 60)
