"""Event streams: each sends the changes of its own client's tasks, uses little memory, and ends."""

import asyncio
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

import httpx2
import pytest
from fastapi.testclient import TestClient

from afterward.errors import QueueUnavailable, TaskNotFound
from afterward.events import Event, EventType
from afterward.task import Status, Task
from app.api import event_stream as stream_module
from app.api.event_stream import Change, EventStream, Reader
from app.api.routes import tasks as routes
from app.api.server_sent_events import HEARTBEAT, EventStreamResponse
from tests.api.requests import problem_of
from tests.api.streams import (
    ADA,
    Connection,
    SlowConnection,
    StreamEvent,
    a_task,
    events_in,
    eventually,
    publish_tasks,
    served,
    stream_of_all_tasks,
)
from tests.support.service import PATIENCE, Json, Service, wait_for

SEND = "/send-notification/ada@example.com"


# The readers of an event stream.


async def unread(reader: Reader) -> list[Change]:
    """Drop a reader, and return the changes that it has not read."""
    reader.close()
    return [change async for changes in reader for change in changes]


@pytest.mark.anyio
async def test_a_reader_gets_the_changes_of_its_own_client_only() -> None:
    event_stream = EventStream()
    with (
        event_stream.reader(ADA) as ada,
        event_stream.reader("eve's key") as eve,
        event_stream.reader("") as anybody,
    ):
        publish_tasks(event_stream, a_task(id="1"), a_task(id="2"))
        assert [change.task_id for change in await unread(ada)] == ["1", "2"]
        assert await unread(eve) == []
        assert await unread(anybody) == []


@pytest.mark.anyio
async def test_a_reader_of_a_task_gets_the_changes_of_that_task_only() -> None:
    event_stream = EventStream()
    with event_stream.reader(ADA, "1") as reader:
        publish_tasks(event_stream, a_task(id="1"), a_task(id="2"))
        assert [change.task_id for change in await unread(reader)] == ["1"]


@pytest.mark.anyio
async def test_a_change_is_serialised_once_for_all_readers_and_without_arguments() -> None:
    event_stream = EventStream()
    with event_stream.reader(ADA) as first, event_stream.reader(ADA) as second:
        publish_tasks(event_stream, a_task(arguments='"secret"'))
        (change,), (same,) = await unread(first), await unread(second)
    assert change is same
    assert b"secret" not in change.data


@pytest.mark.anyio
async def test_an_attempt_that_lost_its_task_is_not_shown_to_readers() -> None:
    event_stream = EventStream()
    with event_stream.reader(ADA) as reader:
        event_stream.publish(Event(EventType.LOST, a_task()))
        assert await unread(reader) == []


@pytest.mark.parametrize("limit", ["MOST_UNREAD", "MOST_UNREAD_BYTES"])
@pytest.mark.anyio
async def test_a_reader_that_falls_behind_is_dropped_with_its_changes(
    monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    monkeypatch.setattr(stream_module, limit, {"MOST_UNREAD": 10, "MOST_UNREAD_BYTES": 5000}[limit])
    event_stream = EventStream()
    with event_stream.reader(ADA) as slow, event_stream.reader(ADA) as quick:
        for number in range(100):
            publish_tasks(event_stream, a_task(id=str(number)))
            assert [change.task_id for change in await anext(quick)] == [str(number)]
        assert slow.fell_behind
        assert not quick.fell_behind
        assert await unread(slow) == []


@pytest.mark.anyio
async def test_a_reader_gets_many_changes_in_several_portions() -> None:
    """Then a connection with a client that does not read holds little memory."""
    event_stream = EventStream()
    with event_stream.reader(ADA) as reader:
        publish_tasks(event_stream, *(a_task(id=str(number)) for number in range(500)))
        steps = list[Sequence[Change]]()
        while sum(len(step) for step in steps) < 500:
            steps.append(await anext(reader))
    assert len(steps) > 5
    assert [change.task_id for step in steps for change in step] == list(map(str, range(500)))


@pytest.mark.anyio
async def test_a_reader_that_has_left_is_forgotten() -> None:
    event_stream = EventStream()
    with event_stream.reader(ADA), event_stream.reader(ADA, "1"), event_stream.reader(ADA):
        assert len(event_stream._readers) == 2
    assert event_stream._readers == {}


@pytest.mark.anyio
async def test_a_reader_that_comes_after_the_stop_is_dropped_at_once() -> None:
    event_stream = EventStream()
    event_stream.close()
    with event_stream.reader(ADA) as reader:
        assert [changes async for changes in reader] == []


@pytest.mark.anyio
async def test_a_reader_gives_missed_changes_first_and_leaves_out_what_they_have_told() -> None:
    """A change was published while the record was read, so the record may have it, or a later one.

    In the order of this test, 2 is in both; of 1, the record has the later change; 3 is new.
    """
    event_stream = EventStream()
    with event_stream.reader(ADA) as reader:
        give = reader.expect_replay("0.0-")
        publish_tasks(event_stream, a_task(id="1", updated_at=1.0), a_task(id="2", updated_at=2.0))
        missed = a_task(id="2", updated_at=2.0), a_task(id="1", updated_at=3.0)
        give(map(Change.of, missed))
        publish_tasks(event_stream, a_task(id="3", updated_at=4.0), a_task(id="2", updated_at=4.0))
        told = [change.id for change in await anext(reader)]
        told += [change.id for change in await anext(reader)]
    assert told == ["2.000000-2", "3.000000-1", "4.000000-3", "4.000000-2"]


@pytest.mark.anyio
async def test_a_reader_forgets_its_replay_when_the_changes_are_newer() -> None:
    """Until then it remembers an entry for each replayed task."""
    event_stream = EventStream()
    with event_stream.reader(ADA) as reader:
        reader.expect_replay("0.0-")([Change.of(a_task(id="1", updated_at=3.0))])
        await anext(reader)
        for at, remembered in ((7.9, 1), (8.1, 0)):
            publish_tasks(event_stream, a_task(id="2", updated_at=at))
            await anext(reader)
            assert len(reader._replayed) == remembered


@pytest.mark.anyio
async def test_a_reader_that_is_closed_already_replays_nothing() -> None:
    event_stream = EventStream()
    event_stream.close()
    with event_stream.reader(ADA) as reader:
        reader.expect_replay("0.0-")([Change.of(a_task())])
        assert await unread(reader) == []


# The response, called as a server calls it.


class Records:
    """The part of an engine that a stream uses: it reads the row of a task."""

    def __init__(self, task: Task) -> None:
        self.answer: Task | Exception = task

    async def get(self, task_id: str) -> Task:
        """Return the task, or raise the error that a test has set instead."""
        if isinstance(self.answer, Exception):
            raise self.answer
        assert self.answer.id == task_id
        return self.answer


def stream_of_task_1(event_stream: EventStream, records: Records) -> EventStreamResponse:
    """Make the stream of `GET /tasks/1/events`, as its route does."""
    engine: Any = records
    return EventStreamResponse(
        event_stream.reader(ADA, "1"), partial(routes._write_task_events, "1", engine)
    )


@pytest.mark.anyio
async def test_a_reader_is_removed_as_soon_as_its_client_disconnects() -> None:
    """No event wakes the stream in this test, and it does not rely on the garbage collector."""
    event_stream, connection = EventStream(), Connection()
    async with served(stream_of_all_tasks(event_stream), connection):
        assert len(event_stream._readers) == 1
        connection.gone.set()
    assert event_stream._readers == {}


@pytest.mark.anyio
async def test_a_reader_is_removed_when_the_server_cancels_its_stream() -> None:
    event_stream, connection = EventStream(), Connection()
    with suppress(asyncio.CancelledError):
        async with served(stream_of_all_tasks(event_stream), connection):
            raise asyncio.CancelledError
    await eventually(lambda: not event_stream._readers)


@pytest.mark.anyio
async def test_changes_that_wait_for_a_disconnected_client_are_not_sent() -> None:
    event_stream, connection = EventStream(), Connection()
    async with served(stream_of_all_tasks(event_stream), connection):
        connection.gone.set()
        publish_tasks(event_stream, *(a_task(id=str(number)) for number in range(1000)))
    assert len(events_in(connection.text)) < 1000


@pytest.mark.anyio
async def test_a_client_that_reads_too_slowly_gets_a_gap_event(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stream_module, "MOST_UNREAD", 3)
    event_stream, connection = EventStream(), Connection()
    async with served(stream_of_all_tasks(event_stream), connection):
        publish_tasks(event_stream, a_task(id="told"))
        await eventually(lambda: "told" in connection.text)
        publish_tasks(event_stream, *(a_task(id=str(number)) for number in range(4)))
    told, gap = events_in(connection.text)
    assert (gap.event, gap.id) == ("gap", told.id)
    assert "too slowly" in gap.data["detail"]
    assert connection.sent[-1] == {"type": "http.response.body", "body": b"", "more_body": False}


@pytest.mark.anyio
async def test_a_new_client_learns_its_position_without_an_event() -> None:
    """If its connection breaks before the first event, an EventSource returns with this id.

    A block without data sets the id, and dispatches no event (WHATWG HTML, 9.2.6).
    """
    event_stream, connection = EventStream(), Connection()
    async with served(stream_of_all_tasks(event_stream), connection):
        await eventually(lambda: connection.text.endswith("\n\n"))
        assert connection.text == "retry: 3000\nid: 5.000000-\n\n"
        connection.gone.set()


@pytest.mark.anyio
async def test_a_client_that_returns_gets_the_changes_in_the_record_and_then_new_ones() -> None:
    event_stream, connection = EventStream(), Connection()
    missed = [a_task(id="1", updated_at=2.0), a_task(id="2", updated_at=3.0)]
    returned = stream_of_all_tasks(event_stream, missed, last_event_id="1.000000-1")
    async with served(returned, connection):
        publish_tasks(event_stream, a_task(id="3", updated_at=5.0))
        await eventually(lambda: "5.000000-3" in connection.text)
        connection.gone.set()
    told = [(event.event, event.id) for event in events_in(connection.text)]
    assert told == [("task", "2.000000-1"), ("task", "3.000000-2"), ("task", "5.000000-3")]


@pytest.mark.parametrize("last_event_id", ["", "1", "x", "\xe9", "nan-1", "1.000000-1", "x" * 5000])
@pytest.mark.anyio
async def test_a_client_that_returns_gets_a_gap_event_if_nothing_can_be_replayed(
    last_event_id: str,
) -> None:
    """The id is not an id of an event, or the record has too many changes."""
    event_stream, connection = EventStream(), Connection()
    returned = stream_of_all_tasks(event_stream, None, last_event_id=last_event_id)
    async with served(returned, connection):
        await eventually(lambda: "gap" in connection.text)
        publish_tasks(event_stream, a_task(id="3", updated_at=5.0))
        await eventually(lambda: "5.000000-3" in connection.text)
        connection.gone.set()
    gap, new = events_in(connection.text)
    assert (gap.event, gap.id, new.event) == ("gap", "5.000000-", "task")
    assert "are missing" in gap.data["detail"]


@pytest.mark.anyio
async def test_a_client_that_reads_too_slowly_during_a_replay_returns_to_the_rest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The gap event has the id of the last event that was sent, so the next replay begins there."""
    monkeypatch.setattr(stream_module, "MOST_UNREAD", 3)
    monkeypatch.setattr(stream_module, "_BYTES_PER_READ", 1)
    event_stream, connection = EventStream(), SlowConnection(blocks=2)
    missed = [a_task(id=str(number), updated_at=2.0) for number in range(9)]
    returned = stream_of_all_tasks(event_stream, missed, last_event_id="1.000000-1")
    async with served(returned, connection):
        await eventually(lambda: "2.000000-0" in connection.text)
        publish_tasks(event_stream, *(a_task(id=str(number), updated_at=5.0) for number in "abcd"))
        connection.reads_again.set()
    told, gap = events_in(connection.text)
    assert (told.event, gap.event, gap.id) == ("task", "gap", told.id)


@pytest.mark.anyio
async def test_a_server_that_stops_ends_a_replay_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """No later event is sent, so the client returns for the rest."""
    monkeypatch.setattr(stream_module, "_BYTES_PER_READ", 1)
    event_stream, connection = EventStream(), SlowConnection(blocks=2)
    missed = [a_task(id=str(number), updated_at=2.0) for number in range(9)]
    returned = stream_of_all_tasks(event_stream, missed, last_event_id="1.000000-1")
    async with served(returned, connection):
        await eventually(lambda: "2.000000-0" in connection.text)
        publish_tasks(event_stream, a_task(id="new", updated_at=5.0))
        event_stream.close()
        publish_tasks(event_stream, a_task(id="ended during the stop", updated_at=6.0))
        connection.reads_again.set()
    assert [event.id for event in events_in(connection.text)] == ["2.000000-0"]
    assert connection.text.endswith("\n\nid: 2.000000-0\n\n")


@pytest.mark.anyio
async def test_a_client_that_returns_while_the_server_stops_keeps_its_position() -> None:
    event_stream, connection = EventStream(), Connection()
    event_stream.close()
    missed = [a_task(id="1", updated_at=2.0)]
    async with served(
        stream_of_all_tasks(event_stream, missed, last_event_id="1.000000-1"), connection
    ):
        pass
    assert connection.text == "retry: 3000\nid: 1.000000-1\n\n"


@pytest.mark.parametrize(
    "stream",
    [stream_of_all_tasks, lambda event_stream: stream_of_task_1(event_stream, Records(a_task()))],
)
@pytest.mark.anyio
async def test_a_quiet_stream_sends_heartbeats(
    monkeypatch: pytest.MonkeyPatch, stream: Any
) -> None:
    """Heartbeats are comments, which an EventSource ignores."""
    monkeypatch.setattr(stream_module, "QUIET_SECONDS", 0.01)
    event_stream, connection = EventStream(), Connection()
    async with served(stream(event_stream), connection):
        await eventually(lambda: connection.text.count(HEARTBEAT.decode()) > 2)
        connection.gone.set()


def test_heartbeats_are_at_most_fifteen_seconds_apart() -> None:
    assert stream_module.QUIET_SECONDS <= 15


@pytest.mark.anyio
async def test_the_removal_of_a_task_ends_its_stream_with_a_gap_event(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A gap event says that the end of the task is unknown, because its row is gone."""
    monkeypatch.setattr(stream_module, "QUIET_SECONDS", 0.01)
    event_stream, connection, records = EventStream(), Connection(), Records(a_task())
    async with served(stream_of_task_1(event_stream, records), connection):
        records.answer = TaskNotFound()
    begun, gap = events_in(connection.text)
    assert (begun.event, gap.event, gap.id) == ("task", "gap", begun.id)
    assert "removed" in gap.data["detail"]


@pytest.mark.anyio
async def test_the_stream_of_a_task_goes_on_while_the_database_is_away(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stream_module, "QUIET_SECONDS", 0.01)
    event_stream, connection, records = EventStream(), Connection(), Records(a_task())
    async with served(stream_of_task_1(event_stream, records), connection):
        records.answer = QueueUnavailable()
        await eventually(lambda: HEARTBEAT.decode() in connection.text)
        records.answer = a_task(status=Status.SUCCEEDED, updated_at=2.0)
    assert [told.event for told in events_in(connection.text)] == ["task", "end"]


@pytest.mark.anyio
async def test_an_error_before_the_stream_begins_is_answered_by_the_service() -> None:
    """No part of the response has been sent, so the service can still answer with a problem."""
    event_stream, connection, records = EventStream(), Connection(), Records(a_task())
    records.answer = TaskNotFound()
    with pytest.raises(TaskNotFound):
        async with served(stream_of_task_1(event_stream, records), connection):
            pass
    assert connection.sent == []
    assert event_stream._readers == {}


@pytest.mark.anyio
async def test_changes_older_than_the_row_that_was_read_are_not_sent() -> None:
    event_stream, connection = EventStream(), Connection()
    running = a_task(status=Status.RUNNING, updated_at=2.0)
    async with served(stream_of_task_1(event_stream, Records(running)), connection):
        publish_tasks(event_stream, a_task(updated_at=1.0), running)
        publish_tasks(event_stream, replace(running, status=Status.FAILED, updated_at=3.0))
    told = [(event.event, event.data["status"]) for event in events_in(connection.text)]
    assert told == [("task", "running"), ("end", "failed")]


@pytest.mark.anyio
async def test_the_stream_of_a_task_ends_even_if_the_task_is_retried_at_once() -> None:
    event_stream, connection = EventStream(), Connection()
    async with served(stream_of_task_1(event_stream, Records(a_task())), connection):
        publish_tasks(
            event_stream,
            a_task(status=Status.FAILED, updated_at=2.0),
            a_task(status=Status.QUEUED, updated_at=3.0),
        )
    assert [event.event for event in events_in(connection.text)] == ["task", "end"]


@pytest.mark.anyio
async def test_a_reader_of_a_task_that_falls_behind_gets_a_gap_event(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stream_module, "MOST_UNREAD", 3)
    event_stream, connection = EventStream(), Connection()
    async with served(stream_of_task_1(event_stream, Records(a_task())), connection):
        publish_tasks(
            event_stream, *(a_task(updated_at=at, progress=at / 10) for at in (2.0, 3.0, 4.0, 5.0))
        )
    assert [event.event for event in events_in(connection.text)] == ["task", "gap"]


# The routes.


def a_finished_task(client: httpx2.Client) -> str:
    task_id: str = client.post(SEND).json()["id"]
    wait_for(client, task_id)
    return task_id


def test_an_eventsource_does_not_reconnect_after_the_end_of_its_task(client: TestClient) -> None:
    """The second request gets 204, after which it does not reconnect (WHATWG HTML, 9.2.3)."""
    task_id = a_finished_task(client)
    first = client.get(f"/tasks/{task_id}/events")
    (end,) = events_in(first.text)
    assert (end.event, end.data) == ("end", in_a_list(client.get(f"/tasks/{task_id}").json()))
    assert first.text.startswith("retry: ")

    second = client.get(f"/tasks/{task_id}/events", headers={"Last-Event-ID": end.id})
    assert (second.status_code, second.content) == (204, b"")


def test_an_older_last_event_id_does_not_hide_the_end(client: TestClient) -> None:
    """A client sends the id of the event before the end if its connection broke in between."""
    task_id = a_finished_task(client)
    for other in ("", "1.000000-" + task_id, "\xe9", "x" * 5000):
        answer = client.get(
            f"/tasks/{task_id}/events", headers={b"Last-Event-ID": other.encode("latin-1")}
        )
        assert [told.event for told in events_in(answer.text)] == ["end"]


def test_a_retried_task_has_a_stream_again(idle_client: TestClient) -> None:
    task_id = idle_client.post(SEND).json()["id"]
    idle_client.post(f"/tasks/{task_id}/cancel")
    (end,) = events_in(idle_client.get(f"/tasks/{task_id}/events").text)
    idle_client.post(f"/tasks/{task_id}/retry")
    idle_client.post(f"/tasks/{task_id}/cancel")
    again = idle_client.get(f"/tasks/{task_id}/events", headers={"Last-Event-ID": end.id})
    assert again.status_code == 200
    assert events_in(again.text)[-1].id > end.id


def test_the_events_of_an_unknown_task_are_not_found(idle_client: TestClient) -> None:
    problem_of(idle_client.get("/tasks/unknown/events", headers={"Last-Event-ID": "1-x"}), 404)


def test_the_headers_of_a_stream_forbid_caching_and_buffering(client: TestClient) -> None:
    headers = client.get(f"/tasks/{a_finished_task(client)}/events").headers
    assert headers["content-type"] == "text/event-stream; charset=utf-8"
    assert headers["cache-control"] == "no-store"
    assert headers["x-accel-buffering"] == "no"
    assert "content-length" not in headers


@contextmanager
def stream_of(service: Service, path: str, **headers: str) -> Iterator[Iterator[StreamEvent]]:
    """Follow a stream, which has begun when the block begins, until the server ends it."""
    with httpx2.stream("GET", service.url + path, headers=headers, timeout=PATIENCE) as stream:
        yield _events(stream)


def _events(stream: httpx2.Response) -> Iterator[StreamEvent]:
    block = ""
    for line in stream.iter_lines():
        if not line and "data: " in block:
            yield StreamEvent.of(block)
        block = block + line + "\n" if line and not line.startswith(":") else ""


def test_each_change_of_a_task_is_an_event_with_a_name_and_an_id(service: Service) -> None:
    with stream_of(service, "/events") as all_events:
        task_id = service.post(SEND).json()["id"]
        with stream_of(service, f"/tasks/{task_id}/events") as own_events:
            own = list(own_events)
        told = [next(all_events) for _ in range(3)]
    assert [(event.event, event.data["status"]) for event in told] == [
        ("task", "queued"),
        ("task", "running"),
        ("task", "succeeded"),
    ]
    assert {event.event for event in own[:-1]} <= {"task"}
    assert (own[-1].event, own[-1].id) == ("end", told[-1].id)
    assert len({event.id for event in told}) == 3


def test_a_client_that_returns_to_all_events_gets_what_it_has_missed(service: Service) -> None:
    """It was away while two tasks succeeded. Of each, it gets one event."""
    with stream_of(service, "/events") as events:
        service.post(SEND)
        last = next(events)
    missed = [service.wait_for(service.post(SEND).json()["id"])["id"] for _ in range(2)]
    with stream_of(service, "/events", **{"Last-Event-ID": last.id}) as events:
        task_id = service.post(SEND).json()["id"]
        told = list(takewhile(lambda event: event.data["id"] != task_id, events))
    assert {event.event for event in told} == {"task"}
    assert [event.data["id"] for event in told if event.data["id"] in missed] == missed
    assert told[-1].data["status"] == "succeeded"
    assert told[-1].data == in_a_list(service.get(f"/tasks/{missed[-1]}").json())


def in_a_list(task: Json) -> Json:
    """Return a task with the fields that lists and events have."""
    return {name: value for name, value in task.items() if name != "history"}


def test_a_client_with_an_id_from_long_ago_gets_a_gap_event_and_then_new_events(
    service: Service,
) -> None:
    """Retention may have removed tasks since then."""
    with stream_of(service, "/events", **{"Last-Event-ID": "1.000000-x"}) as events:
        assert next(events).event == "gap"
        task_id = service.post(SEND).json()["id"]
        assert next(events).data["id"] == task_id


@pytest.mark.thorough
def test_a_client_gets_a_gap_if_failed_tasks_may_have_been_removed(tmp_path: Path) -> None:
    """They may be kept for a shorter time than the others."""
    yesterday = f"{time.time() - 24 * 3600:.6f}-x"
    with (
        Service(tmp_path, worker_concurrency=0, retention_failed_days=0.5) as service,
        stream_of(service, "/events", **{"Last-Event-ID": yesterday}) as events,
    ):
        assert next(events).event == "gap"


@pytest.mark.thorough
def test_a_client_returns_to_a_service_that_has_restarted(tmp_path: Path) -> None:
    """No process has told it of the change, because the service was killed at once."""
    with Service(tmp_path, worker_concurrency=0) as service:
        with stream_of(service, "/events") as events:
            service.post(SEND)
            last = next(events)
        task_id = service.post(SEND).json()["id"]
        service.kill()
        service.start()
        with stream_of(service, "/events", **{"Last-Event-ID": last.id}) as events:
            assert next(events).data["id"] == task_id
