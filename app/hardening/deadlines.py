"""Deadlines for slow clients: a protocol class for uvicorn, which by itself waits without limit.

The class also bounds the head of a request and the number of connections. It answers clients that
close only their sending side, and clients that speak HTTP/1.0.
"""

import asyncio
import contextlib
import resource
import socket
import struct
from typing import Any, Literal

import structlog
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import (
    STATUS_LINE,
    HttpToolsProtocol,
    RequestResponseCycle,
)

from app.api.errors import problem
from app.settings import Settings

STEP = 64 * 1024  # bytes of a body for which the client has one deadline
MOST_HEAD_BYTES = 64 * 1024  # of a head, and of everything else in a request that is not its body

RESERVED_FILES = 64  # descriptors for other things than clients: the database, SMTP, the log
MOST_FILES = 65_536  # descriptors that the process asks for
MOST_PIPELINED = 32  # requests of one connection that wait for the responses to earlier ones

WARNING_INTERVAL = 10.0  # seconds between two warnings about too many clients

TOO_SLOW = "The request did not arrive in time."
HEAD_TOO_LARGE = "The head of the request is too large."
TOO_MANY_CLIENTS = "Too many clients are connected at the moment. Try again later."
NOT_HTTP = "This is not a valid HTTP request."

log = structlog.get_logger(__name__)


def protocol_with_deadlines(settings: Settings) -> type["ProtocolWithDeadlines"]:
    """Return the protocol class with the deadline of these settings."""

    class Protocol(ProtocolWithDeadlines):
        seconds = settings.client_timeout_seconds
        most_clients = raise_client_limit()

    return Protocol


def raise_client_limit() -> int:
    """Return how many clients may be connected at once, after raising the limit of descriptors.

    Each client needs a descriptor for its connection and another one for an uploaded file. By
    default systems allow a process fewer descriptors than they could, because programs that use
    select() cannot handle more.
    """
    files, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    more = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    if more > files:
        with contextlib.suppress(ValueError):  # macOS has a lower limit than the one it reports
            resource.setrlimit(resource.RLIMIT_NOFILE, (more, hard))
            files = more
    return max(1, (files - RESERVED_FILES) // 2)


class ProtocolWithDeadlines(HttpToolsProtocol):
    """A connection whose client must send and read at a minimum pace.

    The client has `seconds` to send the head of a request, and then `seconds` for each STEP of the
    body. It has the same time for each STEP of the response that it reads. The clock stands still
    while the service itself is at work: while it does not read, or has nothing to send.

    After the response, the service no longer reads the rest of a request's body. The client may
    finish sending it within `seconds`.
    """

    seconds: float
    most_clients: int  # further ones are refused, so that descriptors remain for everything else
    _warned_at = float("-inf")  # about too many clients, by any connection

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the clock: the client has to send a head."""
        super().connection_made(transport)
        self._expected: Literal["head", "body"] | None = "head"
        self._since = self.loop.time()  # when the client began to send the expected part
        self._head_bytes = 0
        self._body_bytes = 0  # of the current step
        self._unread, self._unread_since = 0, self._since
        self._half_closed = False
        self._timer = self.loop.call_later(self.seconds / 4, self._check_deadlines)
        if len(self.connections) > self.most_clients:
            self._refuse_connection()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the clock."""
        self._timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse the data. Refuse a head or trailers that are too large."""
        if self._expected is None:
            # Either the next head begins, or empty lines before it, which the parser ignores.
            self._expect("head")
        self._head_bytes += len(data)
        super().data_received(data)  # on_body sets _head_bytes back to 0
        if self._head_bytes > MOST_HEAD_BYTES and not self.transport.is_closing():
            self._refuse(431, HEAD_TOO_LARGE)

    def eof_received(self) -> bool:  # type: ignore[override]
        """Handle a client that has closed its sending side and may still read.

        Returns True, which keeps the connection open, if complete requests wait for their
        responses. An incomplete request is dropped at once, because the rest cannot come any more.
        """
        self._half_closed = True
        self._expect(None)
        if self._all_answered():
            return False
        if self.cycle.more_body:  # the newest request is incomplete
            if not self.pipeline:
                return False
            self.pipeline.popleft()  # the newest one; the requests before it are complete
        self.cycle.keep_alive = False
        return True

    # Callbacks of the parser, in the order in which it calls them

    def on_message_begin(self) -> None:
        """Expect a head. The parser turns the ValueError into an answer with status 400."""
        if len(self.pipeline) >= MOST_PIPELINED:
            raise ValueError("too many requests before the answer to the first")
        if self._expected != "head":  # otherwise empty lines before the head would extend its time
            self._expect("head")
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """Expect a body."""
        super().on_headers_complete()
        if self.scope["http_version"] == "1.0":
            # In HTTP/1.0 a connection stays open only if the client asks for it.
            self.cycle.keep_alive = self.parser.should_keep_alive()
            # A client of HTTP/1.0 does not know "100 Continue" (RFC 9110, 10.1.1).
            self.cycle.waiting_for_100_continue = False
        self._expect("body")

    def on_body(self, body: bytes) -> None:
        """Start the clock again for each step of the body."""
        self._head_bytes = 0
        self._body_bytes += len(body)
        if self._body_bytes >= STEP and not self.cycle.response_complete:
            self._expect("body")
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Expect nothing until the next request begins."""
        self._expect(None)
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """Give the client the time of one step to finish a body that the service does not read."""
        self._since = self.loop.time()
        is_last = not self.pipeline
        super().on_response_complete()
        if self._half_closed and is_last:
            self.transport.close()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        if cycle.scope["http_version"] == "1.0":
            app = WithoutChunks(app, cycle)
        super()._start_asgi_task(cycle, app)

    def _expect(self, part: Literal["head", "body"] | None) -> None:
        """Note the part that the client has to send next, and start its clock."""
        self._expected = part
        self._since = self.loop.time()
        self._head_bytes = self._body_bytes = 0

    # The deadlines

    def _check_deadlines(self) -> None:
        """Disconnect the client if it is too slow. Runs four times within `seconds`."""
        self._timer = self.loop.call_later(self.seconds / 4, self._check_deadlines)
        now = self.loop.time()
        # 1. Does the client read the response? `unread` is what waits to be sent. Its clock starts
        # again when everything was read, when new data was added, or when the client has read a
        # whole step since the clock started.
        unread = self.transport.get_write_buffer_size()
        if not unread or not -STEP < unread - self._unread <= 0:
            self._unread, self._unread_since = unread, now
        elif now - self._unread_since >= self.seconds:
            log.info("client too slow", doing="reading", address=self.client)
            self._abort()
            return
        if self.transport.is_closing():
            return
        # 2. Is a client that has closed its sending side still there?
        if self._half_closed and self._has_failed():
            self._abort()
            return
        # 3. Does the client send the request? While the service does not read, the clock stands
        # still. A head is due only when every earlier request is answered.
        if self.flow.read_paused:
            self._since = now
        is_due = self._expected == "body" or (self._expected == "head" and self._all_answered())
        if is_due and now - self._since >= self.seconds:
            log.info("client too slow", doing=f"sending the {self._expected}", address=self.client)
            self._refuse(408, TOO_SLOW)

    def _unsupported_upgrade_warning(self) -> None:
        """Log nothing. A request to switch to another protocol is answered in HTTP/1.1."""

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002 - uvicorn's text
        """Answer malformed HTTP with a problem, where uvicorn would send plain text."""
        self._refuse(400, NOT_HTTP)

    def _refuse(self, status: int, detail: str) -> None:
        """Answer with an error if the client can relate it to this request; close the connection.

        It cannot if earlier requests have no response yet, or if the response has begun.
        """
        is_next = self._all_answered() if self._expected == "head" else not self.pipeline
        if is_next and not (self._expected == "body" and self.cycle.response_started):
            response = problem("", status, detail, headers={"Connection": "close"})
            lines = [b"%s: %s\r\n" % header for header in response.raw_headers]
            head = [STATUS_LINE[status], *lines, b"\r\n"]
            self.transport.write(b"".join(head) + bytes(response.body))
        self.transport.close()

    def _refuse_connection(self) -> None:
        """Answer 503, because too many clients are connected; log a warning now and then."""
        if self._since - self._warned_at >= WARNING_INTERVAL:
            ProtocolWithDeadlines._warned_at = self._since
            log.warning("too many clients", most=self.most_clients)
        self._refuse(503, TOO_MANY_CLIENTS)

    def _abort(self) -> None:
        """Close the connection, and discard the data that waits in the system's send buffer.

        With SO_LINGER on and 0 seconds, the system resets the connection instead of sending on.
        """
        linger = struct.pack("ii", 1, 0)
        self._socket().setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.transport.abort()

    def _has_failed(self) -> bool:
        """Whether a half-closed connection was reset by the client.

        A client that has disconnected looks like one that has closed only its sending side, until
        the service sends something: then the client's system answers with a reset. The event loop
        would notice the reset only at its next write, because it no longer reads from the socket.
        """
        return bool(self._socket().getsockopt(socket.SOL_SOCKET, socket.SO_ERROR))

    def _socket(self) -> Any:
        return self.transport.get_extra_info("socket")

    def _all_answered(self) -> bool:
        """Whether every request so far has its complete response."""
        return self.cycle is None or self.cycle.response_complete


class WithoutChunks:
    """Wraps the app for one HTTP/1.0 request, because HTTP/1.0 has no chunks (RFC 9112, 6.1).

    A response without a Content-Length is sent as it is, and the end of the connection ends its
    body. `cycle` is uvicorn's object for the request and its response.
    """

    def __init__(self, app: ASGIApp, cycle: RequestResponseCycle) -> None:
        self._app = app
        self._cycle = cycle
        self._ends_with_connection = False

    async def __call__(self, scope: Scope, receive: Receive, _: Send) -> None:
        """Serve the request (ASGI)."""
        await self._app(scope, receive, self._send)

    async def _send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            message = self._with_framing(message)
        elif self._ends_with_connection:
            # uvicorn compares each part of the body with the announced length, which is unknown.
            self._cycle.expected_content_length = len(message.get("body", b""))
        await self._cycle.send(message)  # type: ignore[arg-type]

    def _with_framing(self, start: Message) -> Message:
        """Decide how the body ends, and tell the client whether the connection stays open."""
        headers = list(start.get("headers", ()))
        names = {name.lower() for name, _ in headers}
        has_body = self._cycle.scope["method"] != "HEAD" and start["status"] not in (204, 304)
        self._ends_with_connection = has_body and b"content-length" not in names
        if self._ends_with_connection:
            self._cycle.chunked_encoding = False
            self._cycle.keep_alive = False
        elif self._cycle.keep_alive and b"connection" not in names:
            headers.append((b"connection", b"keep-alive"))
        return {**start, "headers": headers}
