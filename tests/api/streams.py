"""Helpers for tests of event streams: tasks to publish, the server's side, parsed events."""

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

from starlette.types import Message

from afterward.events import Event, EventType
from afterward.task import Task
from app.api.event_stream import EventStream
from app.api.replay import Replay
from app.api.routes import tasks as routes
from app.api.server_sent_events import EventStreamResponse
from tests.support.service import PATIENCE, Json

ADA = "ada's key"


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


class SlowConnection(Connection):
    """Takes the head and so many blocks of the body, and the rest once `reads_again` is set."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.reads_again = asyncio.Event()
        self._blocks = blocks

    async def send(self, message: Message) -> None:
        """Keep a message, and return when the connection takes the next one."""
        await super().send(message)
        if len(self.sent) > self._blocks:
            await self.reads_again.wait()


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
    event_stream: EventStream,
    record: Sequence[Task] | None = (),
    *,
    last_event_id: str | None = None,
) -> EventStreamResponse:
    """Make the stream of `GET /events`, as its route does. `record` has the changed tasks."""
    return EventStreamResponse(
        event_stream.reader(ADA),
        partial(routes._write_all_events, replay_of(record), ADA, last_event_id),
    )


def replay_of(record: Sequence[Task] | None) -> Replay:
    """Make a replay at 5 s since the epoch. The record has too many changes if it is None."""

    class Record:
        async def list_changed(self, client: str, **_: object) -> Sequence[Task] | None:
            assert client == ADA
            return record

    engine: Any = Record()
    return Replay(engine, lambda: 5.0, keep_seconds=60.0)
