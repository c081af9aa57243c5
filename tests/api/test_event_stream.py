"""Event streams: each tells its own client's changes, holds little, and ends for good."""

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


def tell(event_stream: EventStream, *tasks: Task) -> None:
    for task in tasks:
        event_stream.publish(Event(EventType.STARTED, task))


@dataclass(frozen=True)
class Told:
    """One event of a stream, as an EventSource reads it."""

    event: str
    id: str
    data: Json

    @classmethod
    def of(cls, block: str) -> Self:
        """Parse an event; it must have each field."""
        fields = dict(line.split(": ", 1) for line in block.splitlines())
        assert fields.keys() - {"retry"} == {"event", "id", "data"}
        return cls(fields["event"], fields["id"], json.loads(fields["data"]))


def events_in(text: str) -> list[Told]:
    """The events of a stream; heartbeats are left out."""
    return [
        Told.of(block) for block in text.split("\n\n") if block.strip(": \n") and "data" in block
    ]


# What a reader of the event_stream is given.


async def unread(reader: Reader) -> list[Change]:
    """All changes that wait, of a reader that is let go."""
    reader.close()
    return [change async for changes in reader for change in changes]


@pytest.mark.anyio
async def test_a_reader_is_given_the_changes_of_its_own_client() -> None:
    event_stream = EventStream()
    with (
        event_stream.reader(ADA) as ada,
        event_stream.reader("eve's key") as eve,
        event_stream.reader("") as anybody,
    ):
        tell(event_stream, a_task(id="1"), a_task(id="2"))
        assert [change.task_id for change in await unread(ada)] == ["1", "2"]
        assert await unread(eve) == []
        assert await unread(anybody) == []


@pytest.mark.anyio
async def test_a_reader_of_one_task_is_given_no_other() -> None:
    event_stream = EventStream()
    with event_stream.reader(ADA, "1") as reader:
        tell(event_stream, a_task(id="1"), a_task(id="2"))
        assert [change.task_id for change in await unread(reader)] == ["1"]


@pytest.mark.anyio
async def test_a_change_is_serialised_once_without_arguments_for_all_its_readers() -> None:
    event_stream = EventStream()
    with event_stream.reader(ADA) as first, event_stream.reader(ADA) as second:
        tell(event_stream, a_task(arguments='"secret"'))
        (change,), (same,) = await unread(first), await unread(second)
    assert change is same
    assert b"secret" not in change.data


@pytest.mark.anyio
async def test_an_attempt_that_had_lost_its_task_is_not_told() -> None:
    event_stream = EventStream()
    with event_stream.reader(ADA) as reader:
        event_stream.publish(Event(EventType.LOST, a_task()))
        assert await unread(reader) == []


@pytest.mark.parametrize("limit", ["MOST_UNREAD", "MOST_UNREAD_BYTES"])
@pytest.mark.anyio
async def test_a_reader_that_falls_behind_is_let_go_and_holds_nothing(
    monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    monkeypatch.setattr(stream_module, limit, {"MOST_UNREAD": 10, "MOST_UNREAD_BYTES": 5000}[limit])
    event_stream = EventStream()
    with event_stream.reader(ADA) as slow, event_stream.reader(ADA) as quick:
        for number in range(100):
            tell(event_stream, a_task(id=str(number)))
            assert [change.task_id for change in await anext(quick)] == [str(number)]
        assert slow.fell_behind
        assert not quick.fell_behind
        assert await unread(slow) == []


@pytest.mark.anyio
async def test_a_reader_is_given_much_in_several_steps() -> None:
    """So that a connection whose client does not read holds little."""
    event_stream = EventStream()
    with event_stream.reader(ADA) as reader:
        tell(event_stream, *(a_task(id=str(number)) for number in range(500)))
        steps = list[Sequence[Change]]()
        while sum(len(step) for step in steps) < 500:
            steps.append(await anext(reader))
    assert len(steps) > 5
    assert [change.task_id for step in steps for change in step] == list(map(str, range(500)))


@pytest.mark.anyio
async def test_nothing_stays_of_readers_that_have_left() -> None:
    event_stream = EventStream()
    with event_stream.reader(ADA), event_stream.reader(ADA, "1"), event_stream.reader(ADA):
        assert len(event_stream._readers) == 2
    assert event_stream._readers == {}


@pytest.mark.anyio
async def test_a_reader_that_comes_after_the_end_is_let_go_at_once() -> None:
    event_stream = EventStream()
    event_stream.close()
    with event_stream.reader(ADA) as reader:
        assert [changes async for changes in reader] == []


# The response, as a server calls it.


class Connection:
    """The server's side of an event stream: what it sends, and the client's disconnect."""

    def __init__(self) -> None:
        self.sent: list[Message] = []
        self.gone = asyncio.Event()
        self._requests = [{"type": "http.request", "body": b"", "more_body": False}]

    async def receive(self) -> Message:
        """Give the request, and the disconnect once the client is gone (ASGI)."""
        if self._requests:
            return self._requests.pop()
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        """Take a part of the answer (ASGI)."""
        self.sent.append(message)

    @property
    def text(self) -> str:
        """The body that was sent so far."""
        return b"".join(message.get("body", b"") for message in self.sent).decode()


@asynccontextmanager
async def served(stream: EventStreamResponse, connection: Connection) -> AsyncIterator[None]:
    """Serve a stream until the block ends; it has begun when the block begins."""
    serving = asyncio.create_task(stream({"type": "http"}, connection.receive, connection.send))
    try:
        await eventually(lambda: len(connection.sent) > 1 or serving.done())
        yield
        await asyncio.wait_for(serving, PATIENCE)
    finally:
        serving.cancel()


async def eventually(true: Any) -> None:
    async with asyncio.timeout(PATIENCE):
        while not true():  # noqa: ASYNC110 - what it waits for has no event
            await asyncio.sleep(0.001)


def all_of(event_stream: EventStream, *, came_back: bool = False) -> EventStreamResponse:
    """The stream of `GET /events`, as its route makes it."""
    return EventStreamResponse(
        event_stream.reader(ADA), partial(routes._write_all_events, event_id(5.0), came_back)
    )


class Records:
    """The part of an engine that a stream uses: the record of one task."""

    def __init__(self, task: Task) -> None:
        self.answer: Task | Exception = task

    async def get(self, task_id: str) -> Task:
        """Return the task, or raise the error that stands for it."""
        if isinstance(self.answer, Exception):
            raise self.answer
        assert self.answer.id == task_id
        return self.answer


def one_of(event_stream: EventStream, records: Records) -> EventStreamResponse:
    """The stream of `GET /tasks/1/events`, as its route makes it."""
    engine: Any = records
    return EventStreamResponse(
        event_stream.reader(ADA, "1"), partial(routes._write_task_events, "1", engine)
    )


@pytest.mark.anyio
async def test_a_stream_leaves_the_feed_as_soon_as_its_client_disconnects() -> None:
    """Nothing else happens that would make it look, and no garbage is collected."""
    event_stream, connection = EventStream(), Connection()
    async with served(all_of(event_stream), connection):
        assert len(event_stream._readers) == 1
        connection.gone.set()
    assert event_stream._readers == {}


@pytest.mark.anyio
async def test_a_stream_leaves_the_feed_when_the_server_cancels_it() -> None:
    event_stream, connection = EventStream(), Connection()
    with suppress(asyncio.CancelledError):
        async with served(all_of(event_stream), connection):
            raise asyncio.CancelledError
    await eventually(lambda: not event_stream._readers)


@pytest.mark.anyio
async def test_what_waits_for_a_client_that_disconnects_is_not_sent() -> None:
    event_stream, connection = EventStream(), Connection()
    async with served(all_of(event_stream), connection):
        connection.gone.set()
        tell(event_stream, *(a_task(id=str(number)) for number in range(1000)))
    assert len(events_in(connection.text)) < 1000


@pytest.mark.anyio
async def test_a_client_that_reads_too_slowly_is_told_of_the_gap(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stream_module, "MOST_UNREAD", 3)
    event_stream, connection = EventStream(), Connection()
    async with served(all_of(event_stream), connection):
        tell(event_stream, a_task(id="told"))
        await eventually(lambda: "told" in connection.text)
        tell(event_stream, *(a_task(id=str(number)) for number in range(4)))
    told, gap = events_in(connection.text)
    assert (gap.event, gap.id) == ("gap", told.id)
    assert "too slowly" in gap.data["detail"]
    assert connection.sent[-1] == {"type": "http.response.body", "body": b"", "more_body": False}


@pytest.mark.anyio
async def test_a_client_that_comes_back_is_told_of_the_gap() -> None:
    event_stream, connection = EventStream(), Connection()
    async with served(all_of(event_stream, came_back=True), connection):
        connection.gone.set()
    (gap,) = events_in(connection.text)
    assert (gap.event, gap.id) == ("gap", "5.000000-")
    assert "are missing" in gap.data["detail"]


@pytest.mark.parametrize(
    "stream", [all_of, lambda event_stream: one_of(event_stream, Records(a_task()))]
)
@pytest.mark.anyio
async def test_a_quiet_stream_sends_heartbeats(
    monkeypatch: pytest.MonkeyPatch, stream: Any
) -> None:
    """They are comments, which an EventSource passes over."""
    monkeypatch.setattr(stream_module, "QUIET_SECONDS", 0.01)
    event_stream, connection = EventStream(), Connection()
    async with served(stream(event_stream), connection):
        await eventually(lambda: connection.text.count(HEARTBEAT.decode()) > 2)
        connection.gone.set()


def test_proxies_see_a_heartbeat_at_least_every_fifteen_seconds() -> None:
    assert stream_module.QUIET_SECONDS <= 15


@pytest.mark.anyio
async def test_a_task_that_is_removed_while_it_is_followed_ends_the_stream(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A gap says that the end is not told, because no record is left that would know it."""
    monkeypatch.setattr(stream_module, "QUIET_SECONDS", 0.01)
    event_stream, connection, records = EventStream(), Connection(), Records(a_task())
    async with served(one_of(event_stream, records), connection):
        records.answer = TaskNotFound()
    begun, gap = events_in(connection.text)
    assert (begun.event, gap.event, gap.id) == ("task", "gap", begun.id)
    assert "removed" in gap.data["detail"]


@pytest.mark.anyio
async def test_a_task_is_followed_while_the_database_is_away(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stream_module, "QUIET_SECONDS", 0.01)
    event_stream, connection, records = EventStream(), Connection(), Records(a_task())
    async with served(one_of(event_stream, records), connection):
        records.answer = QueueUnavailable()
        await eventually(lambda: HEARTBEAT.decode() in connection.text)
        records.answer = a_task(status=Status.SUCCEEDED, updated_at=2.0)
    assert [told.event for told in events_in(connection.text)] == ["task", "end"]


@pytest.mark.anyio
async def test_an_error_before_the_stream_begins_is_answered_by_the_service() -> None:
    """Nothing has been sent, so the answer can still be a problem."""
    event_stream, connection, records = EventStream(), Connection(), Records(a_task())
    records.answer = TaskNotFound()
    with pytest.raises(TaskNotFound):
        async with served(one_of(event_stream, records), connection):
            pass
    assert connection.sent == []
    assert event_stream._readers == {}


@pytest.mark.anyio
async def test_changes_before_the_record_was_read_are_not_told_after_it() -> None:
    event_stream, connection = EventStream(), Connection()
    running = a_task(status=Status.RUNNING, updated_at=2.0)
    async with served(one_of(event_stream, Records(running)), connection):
        tell(event_stream, a_task(updated_at=1.0), running)
        tell(event_stream, replace(running, status=Status.FAILED, updated_at=3.0))
    told = [(event.event, event.data["status"]) for event in events_in(connection.text)]
    assert told == [("task", "running"), ("end", "failed")]


@pytest.mark.anyio
async def test_a_stream_ends_with_its_task_though_that_is_tried_again_at_once() -> None:
    event_stream, connection = EventStream(), Connection()
    async with served(one_of(event_stream, Records(a_task())), connection):
        tell(
            event_stream,
            a_task(status=Status.FAILED, updated_at=2.0),
            a_task(status=Status.QUEUED, updated_at=3.0),
        )
    assert [event.event for event in events_in(connection.text)] == ["task", "end"]


@pytest.mark.anyio
async def test_a_reader_of_one_task_that_falls_behind_is_told_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stream_module, "MOST_UNREAD", 3)
    event_stream, connection = EventStream(), Connection()
    async with served(one_of(event_stream, Records(a_task())), connection):
        tell(
            event_stream, *(a_task(updated_at=at, progress=at / 10) for at in (2.0, 3.0, 4.0, 5.0))
        )
    assert [event.event for event in events_in(connection.text)] == ["task", "gap"]


# The routes.


def a_finished_task(client: httpx2.Client) -> str:
    task_id: str = client.post(SEND).json()["id"]
    wait_for(client, task_id)
    return task_id


def test_the_stream_of_a_finished_task_ends_for_good(client: TestClient) -> None:
    """After 204 an EventSource does not come back (WHATWG HTML, 9.2.3)."""
    task_id = a_finished_task(client)
    first = client.get(f"/tasks/{task_id}/events")
    (end,) = events_in(first.text)
    assert (end.event, end.data) == ("end", client.get(f"/tasks/{task_id}").json())
    assert first.text.startswith("retry: ")

    second = client.get(f"/tasks/{task_id}/events", headers={"Last-Event-ID": end.id})
    assert (second.status_code, second.content) == (204, b"")


def test_another_last_id_does_not_hide_the_end(client: TestClient) -> None:
    """For example that of the event before, after which the connection broke off."""
    task_id = a_finished_task(client)
    for other in ("", "1.000000-" + task_id, "\xe9", "x" * 5000):
        answer = client.get(
            f"/tasks/{task_id}/events", headers={b"Last-Event-ID": other.encode("latin-1")}
        )
        assert [told.event for told in events_in(answer.text)] == ["end"]


def test_a_task_that_is_tried_again_is_followed_again(idle_client: TestClient) -> None:
    task_id = idle_client.post(SEND).json()["id"]
    idle_client.post(f"/tasks/{task_id}/cancel")
    (end,) = events_in(idle_client.get(f"/tasks/{task_id}/events").text)
    idle_client.post(f"/tasks/{task_id}/retry")
    idle_client.post(f"/tasks/{task_id}/cancel")
    again = idle_client.get(f"/tasks/{task_id}/events", headers={"Last-Event-ID": end.id})
    assert again.status_code == 200
    assert events_in(again.text)[-1].id > end.id


def test_the_events_of_an_unknown_task_are_a_404(idle_client: TestClient) -> None:
    problem_of(idle_client.get("/tasks/unknown/events", headers={"Last-Event-ID": "1-x"}), 404)


def test_a_stream_says_how_it_is_to_be_passed_on(client: TestClient) -> None:
    headers = client.get(f"/tasks/{a_finished_task(client)}/events").headers
    assert headers["content-type"] == "text/event-stream; charset=utf-8"
    assert headers["cache-control"] == "no-store"
    assert headers["x-accel-buffering"] == "no"
    assert "content-length" not in headers


@contextmanager
def stream_of(service: Service, path: str, **headers: str) -> Iterator[Iterator[Told]]:
    """Follow a stream until the server ends it; it has begun when the block begins."""
    with httpx2.stream("GET", service.url + path, headers=headers, timeout=PATIENCE) as stream:
        yield _events(stream)


def _events(stream: httpx2.Response) -> Iterator[Told]:
    block = ""
    for line in stream.iter_lines():
        if not line and "data: " in block:
            yield Told.of(block)
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


def test_a_client_that_comes_back_to_all_events_is_told_what_is_missing(service: Service) -> None:
    with stream_of(service, "/events", **{"Last-Event-ID": "1.000000-x"}) as events:
        assert next(events).event == "gap"
        task_id = service.post(SEND).json()["id"]
        assert next(events).data["id"] == task_id
