"""Server-sent events as a response (WHATWG HTML, section 9.2)."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractContextManager, aclosing
from typing import Any

from fastapi import Response
from starlette.types import Receive, Scope, Send

from afterward.task import to_json
from app.api.event_stream import Change, Reader

MEDIA_TYPE = "text/event-stream"
RETRY = b"retry: 3000\n"  # milliseconds, after which a client that lost its connection returns
HEARTBEAT = b": heartbeat\n\n"

# A proxy neither stores the stream nor holds it back (X-Accel-Buffering is nginx's).
_HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}

# What a route that streams answers, for its `responses` (OpenAPI 3.2, section 4.14.4).
DOCUMENTED: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "Events: `task` and `end` tell a task, and `gap` what is not told.",
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

FELL_BEHIND = "You read too slowly, so changes were left out. Read the tasks again, and come back."
WAS_AWAY = "Changes between your last event and now are not told. Read the tasks again."
REMOVED = "The task was removed meanwhile. How it ended is not told."

Tell = Callable[[Reader], AsyncGenerator[bytes, None]]


class EventStreamResponse(Response):
    """A response that tells what its reader of the feed gives, until the client disconnects.

    `tell` makes the bytes to be sent from a reader. The response itself opens the reader and closes
    it, because a generator that the server abandons would stay open until the garbage collector
    finds it. An error before the first bytes is answered as in any other route.
    """

    media_type = MEDIA_TYPE

    def __init__(self, reader: AbstractContextManager[Reader], tell: Tell) -> None:
        super().__init__(headers=_HEADERS)
        del self.headers["Content-Length"]
        self._reader = reader
        self._tell = tell

    async def __call__(
        self,
        scope: Scope,  # noqa: ARG002
        receive: Receive,
        send: Send,
    ) -> None:
        """Serve one request (ASGI)."""
        with self._reader as reader:
            watch = asyncio.create_task(_abandon_when_disconnected(receive, reader))
            try:
                await self._send(reader, send)
            finally:
                watch.cancel()

    async def _send(self, reader: Reader, send: Send) -> None:
        head = {
            "type": "http.response.start",
            "status": self.status_code,
            "headers": self.raw_headers,
        }
        started = False
        async with aclosing(self._tell(reader)) as told:
            async for chunk in told:
                if not started:
                    await send(head)
                    started = True
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _abandon_when_disconnected(receive: Receive, reader: Reader) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    reader.abandon()


def told(change: Change, *, last: bool = False) -> bytes:
    """Write a change as an event: `task`, or `end` for the last one of its stream."""
    return _event("end" if last else "task", change.id, change.data)


def gap(detail: str, last_id: str) -> bytes:
    """Write the event that says that changes are missing after the event with `last_id`."""
    return _event("gap", last_id, to_json({"detail": detail}).encode())


def _event(name: str, id: str, data: bytes) -> bytes:  # noqa: A002
    return b"event: %b\nid: %b\ndata: %b\n\n" % (name.encode(), id.encode(), data)
