"""Event streams: each sends the changes of its own client's tasks, uses little memory, and ends."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Self

import httpx2
import pytest
from fastapi.testclient import TestClient
from starlette.types import Message

from afterward.errors import QueueUnavailable, TaskNotFound
from afterward.events import Event, EventType
from afterward.task import Status, Task
from app.api import event_stream as stream_module
from app.api.event_stream import Change, EventStream, Reader, event_id
from app.api.routes import tasks as routes
from app.api.server_sent_events import HEARTBEAT, EventStreamResponse
from tests.api.requests import problem_of
from tests.support.service import PATIENCE, Json, Service, wait_for

ADA = "ada's key"
SEND = "/send-notification/ada@example.com"


def a_task(**facts: Any) -> Task:
    given = {"id": "1", "kind": "send_email", "arguments": '"secret"', "client": ADA}
    times = {"created_at": 1.0, "updated_at": 1.0, "due_at": 1.0}
    return Task(**given | times | {"max_attempts": 8} | facts)


def publish_tasks(event_stream: EventStream, *tasks: Task) -> None:
    for task in tasks:
        event_stream.publish(Event(EventType.STARTED, task))


@dataclass(frozen=True)
class StreamEvent:
    """An event of a stream, as an EventSource reads it."""

    event: str
    id: str
    data: Json

    @classmethod
    def of(cls, block: str) -> Self:
        """Parse an event, which must have the fields event, id and data."""
        fields = dict(line.split(": ", 1) for line in block.splitlines())
        assert fields.keys() - {"retry"} == {"event", "id", "data"}
        return cls(fields["event"], fields["id"], json.loads(fields["data"]))


def events_in(text: str) -> list[StreamEvent]:
    """Return the events in the text of a stream, without heartbeats."""
    return [
        StreamEvent.of(block)
        for block in text.split("\n\n")
        if block.strip(": \n") and "data" in block
    ]


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


# The response, called as a server calls it.


class Connection:
    """The server's side of an event stream: it keeps sent messages, and reports a disconnect."""

    def __init__(self) -> None:
        self.sent: list[Message] = []
        self.gone = asyncio.Event()
        self._requests = [{"type": "http.request", "body": b"", "more_body": False}]

    async def receive(self) -> Message:
        """Return the request, and the disconnect once the client is gone (ASGI)."""
        if self._requests:
            return self._requests.pop()
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        """Keep a message of the response (ASGI)."""
        self.sent.append(message)

    @property
    def text(self) -> str:
        """The part of the body that was sent so far."""
        return b"".join(message.get("body", b"") for message in self.sent).decode()


@asynccontextmanager
async def served(stream: EventStreamResponse, connection: Connection) -> AsyncIterator[None]:
    """Serve a stream, which has begun when the block begins; then wait for the stream's end."""
    serving = asyncio.create_task(stream({"type": "http"}, connection.receive, connection.send))
    try:
        await eventually(lambda: len(connection.sent) > 1 or serving.done())
        yield
        await asyncio.wait_for(serving, PATIENCE)
    finally:
        serving.cancel()


async def eventually(true: Any) -> None:
    async with asyncio.timeout(PATIENCE):
        while not true():  # noqa: ASYNC110 - the awaited change has no event
            await asyncio.sleep(0.001)


def stream_of_all_tasks(
    event_stream: EventStream, *, came_back: bool = False
) -> EventStreamResponse:
    """Make the stream of `GET /events`, as its route does."""
    return EventStreamResponse(
        event_stream.reader(ADA), partial(routes._write_all_events, event_id(5.0), came_back)
    )


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
async def test_a_client_that_reconnects_gets_a_gap_event() -> None:
    event_stream, connection = EventStream(), Connection()
    async with served(stream_of_all_tasks(event_stream, came_back=True), connection):
        connection.gone.set()
    (gap,) = events_in(connection.text)
    assert (gap.event, gap.id) == ("gap", "5.000000-")
    assert "are missing" in gap.data["detail"]


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
    assert (end.event, end.data | {"history": []}) == (
        "end",
        client.get(f"/tasks/{task_id}").json(),
    )
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


def test_a_client_that_reconnects_to_all_events_gets_a_gap_event_and_then_new_events(
    service: Service,
) -> None:
    with stream_of(service, "/events", **{"Last-Event-ID": "1.000000-x"}) as events:
        assert next(events).event == "gap"
        task_id = service.post(SEND).json()["id"]
        assert next(events).data["id"] == task_id
