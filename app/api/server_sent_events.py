"""Server-sent events as a response (WHATWG HTML, section 9.2)."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractContextManager, aclosing
from typing import Any, Protocol, TypeVar

from fastapi import Response
from starlette.types import Receive, Scope, Send

from afterward.task import to_json
from app.api.event_stream import Change

MEDIA_TYPE = "text/event-stream"
# A client that has lost its connection comes back after this many milliseconds.
RETRY = b"retry: 3000\n"
HEARTBEAT = b": heartbeat\n\n"

# Proxies must neither store nor buffer the stream. nginx understands X-Accel-Buffering.
_HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}

# For the `responses` of a route that streams (OpenAPI 3.2, section 4.14.4).
DOCUMENTED: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "Events: `task` has a changed task, `end` a finished one. `gap` says that "
        "events are missing.",
        "content": {
            MEDIA_TYPE: {
                "itemSchema": {
                    "type": "object",
                    "properties": {
                        "event": {"type": "string", "enum": ["task", "end", "gap"]},
                        "id": {"type": "string"},
                        "retry": {"type": "integer", "minimum": 0},
                        "data": {
                            "type": "string",
                            "contentMediaType": "application/json",
                            "contentSchema": {
                                "anyOf": [
                                    {"$ref": "#/components/schemas/TaskView"},
                                    {
                                        "type": "object",
                                        "properties": {"detail": {"type": "string"}},
                                        "required": ["detail"],
                                    },
                                ]
                            },
                        },
                    },
                    "required": ["event", "id", "data"],
                }
            }
        },
    }
}

FELL_BEHIND = (
    "Events are missing, because the client read too slowly, or the service could not read the "
    "record in time. Reconnect with the id of this event as Last-Event-ID to get them."
)
WAS_AWAY = "Events between the last one you read and now are missing. Read the tasks again."
REMOVED = "The task was removed after its retention time, so its last event is missing."


class Discardable(Protocol):
    """A source of events that ends when it is discarded."""

    def discard(self) -> None:
        """End at once."""
        ...


ReaderT = TypeVar("ReaderT", bound=Discardable)


class EventStreamResponse(Response):
    """A response that streams the events of a reader until the client disconnects.

    `write` turns the reader's events into the bytes to send. The response itself opens and closes
    the reader, because a generator that the server drops would stay open until the garbage
    collector finds it. An error before the first bytes becomes an ordinary error response.
    """

    media_type = MEDIA_TYPE

    def __init__(
        self,
        reader: AbstractContextManager[ReaderT],
        write: Callable[[ReaderT], AsyncGenerator[bytes, None]],
    ) -> None:
        super().__init__(headers=_HEADERS)
        del self.headers["Content-Length"]
        self._reader: AbstractContextManager[Discardable] = reader
        self._write: Callable[[Any], AsyncGenerator[bytes, None]] = write

    async def __call__(
        self,
        scope: Scope,  # noqa: ARG002
        receive: Receive,
        send: Send,
    ) -> None:
        """Serve one request (ASGI)."""
        with self._reader as reader:
            watch = asyncio.create_task(_discard_when_disconnected(receive, reader))
            try:
                await self._send(reader, send)
            finally:
                watch.cancel()

    async def _send(self, reader: Discardable, send: Send) -> None:
        head = {
            "type": "http.response.start",
            "status": self.status_code,
            "headers": self.raw_headers,
        }
        started = False
        async with aclosing(self._write(reader)) as chunks:
            async for chunk in chunks:
                if not started:
                    await send(head)
                    started = True
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _discard_when_disconnected(receive: Receive, reader: Discardable) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    reader.discard()


def change_event(change: Change, *, last: bool = False) -> bytes:
    """Write a change as an event: `end` if it is the last event of the stream, or else `task`."""
    return _event("end" if last else "task", change.id, change.data)


def position(id: str) -> bytes:  # noqa: A002
    """Write a block with an id and no event: a client that reconnects sends this id."""
    return b"id: %b\n\n" % id.encode()


def gap_event(detail: str, last_id: str) -> bytes:
    """Write a `gap`: events are missing after the one with the id `last_id`."""
    return _event("gap", last_id, to_json({"detail": detail}).encode())


def _event(name: str, id: str, data: bytes) -> bytes:  # noqa: A002
    return b"event: %b\nid: %b\ndata: %b\n\n" % (name.encode(), id.encode(), data)
