"""The server: uvicorn, with a deadline for clients that dawdle, and bounds on what they send."""

import asyncio
import contextlib
import resource
import socket
import struct
from typing import Any, Literal

import structlog
import uvicorn
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from app.api.problems import problem
from app.settings import Settings

STEP = 64 * 1024  # bytes that a client has its time for
LARGEST_HEAD = 64 * 1024  # bytes; and of whatever else of a request is not its body

OWN_FILES = 64  # descriptors kept for what is no client: the database, SMTP, the log
MOST_FILES = 65_536  # descriptors that are asked for
MOST_PIPELINED = 32  # requests that wait for the answers to those before them

TOLD_EVERY = 10.0  # seconds, at most so often: that there are too many clients

TOO_SLOW = "The request did not come in time."
TOO_LARGE_A_HEAD = "The head of the request is too large."
TOO_MANY = "There are too many clients at the moment."
NO_HTTP = "This is no valid HTTP request."

log = structlog.get_logger(__name__)


def serve(app: Any, settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT."""

    class Protocol(Deadlines):
        seconds = settings.client_timeout_seconds
        most = most_clients()

    uvicorn.run(
        app,
        host=settings.host,
        port=settings.port,
        http=Protocol,
        ws="none",
        # Anybody can write X-Forwarded-For. Nobody's address is asked for behind a proxy: there
        # are keys then, and each key has its own rate.
        proxy_headers=False,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=max(1, round(settings.shutdown_grace_seconds)),
    )


def most_clients() -> int:
    """How many clients there may be at once: each takes a descriptor, and its file another.

    The system gives out fewer than it could, for the sake of programs that use select().
    """
    files, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    more = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    if more > files:
        with contextlib.suppress(ValueError):  # macOS says "infinity", and means it not
            resource.setrlimit(resource.RLIMIT_NOFILE, (more, hard))
            files = more
    return max(1, (files - OWN_FILES) // 2)


class Deadlines(HttpToolsProtocol):
    """A connection whose client has `seconds` for the head of a request, and for each STEP after.

    That is so for the body it sends, and for the answer it reads. What it sends after the answer,
    nobody reads: it may finish within the same time. No time counts in which the service does not
    read, or has nothing to say. uvicorn itself would wait for ever.
    """

    seconds: float
    most: int  # clients; more are turned away, so that descriptors are left for everything else
    _told_at = float("-inf")  # when that was logged, by any connection

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to watch: the client owes a request."""
        super().connection_made(transport)
        self._owes: Literal["head", "body"] | None = "head"
        self._since = self.loop.time()
        self._head_bytes = 0
        self._body_bytes = 0  # of this step
        self._unread, self._unread_since = 0, self._since
        self._watch = self.loop.call_later(self.seconds / 4, self._look)
        if len(self.connections) > self.most:
            self._turn_away()

    def connection_lost(self, exc: Exception | None) -> None:
        """End the watch."""
        self._watch.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse what came; refuse a head that does not end, and endless trailers."""
        if self._owes is None:
            self._expect("head")  # or empty lines before it, which the parser passes over
        self._head_bytes += len(data)
        super().data_received(data)
        if self._head_bytes > LARGEST_HEAD and not self.transport.is_closing():
            self._refuse(431, TOO_LARGE_A_HEAD)

    # What the parser finds, in this order

    def on_message_begin(self) -> None:
        """Expect a head; raises ValueError, which the parser passes on, for one too many."""
        if len(self.pipeline) >= MOST_PIPELINED:
            raise ValueError("too many requests before the answer to the first")
        if self._owes != "head":  # else empty lines before it would win time
            self._expect("head")
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """Expect a body."""
        super().on_headers_complete()
        self._expect("body")

    def on_body(self, body: bytes) -> None:
        """Expect the next step of it."""
        self._head_bytes = 0
        self._body_bytes += len(body)
        if self._body_bytes >= STEP and not self.cycle.response_complete:
            self._expect("body")
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Expect nothing, until the next request begins."""
        self._expect(None)
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """Give the client a last while to finish what nobody reads any more."""
        self._since = self.loop.time()
        super().on_response_complete()

    def _expect(self, what: Literal["head", "body"] | None) -> None:
        self._owes = what
        self._since = self.loop.time()
        self._head_bytes = self._body_bytes = 0

    # What is done about it

    def _look(self) -> None:
        """See whether the client has kept its time; from time to time."""
        self._watch = self.loop.call_later(self.seconds / 4, self._look)
        now = self.loop.time()
        unread = self.transport.get_write_buffer_size()
        if not unread or not -STEP < unread - self._unread <= 0:
            self._unread, self._unread_since = unread, now
        elif now - self._unread_since >= self.seconds:
            log.info("client too slow", doing="reading", address=self.client)
            self._abort()
            return
        if self.transport.is_closing():
            return
        if self.flow.read_paused:
            self._since = now
        counts = self._owes == "body" or (self._owes == "head" and self._is_answered())
        if counts and now - self._since >= self.seconds:
            log.info("client too slow", doing=f"sending the {self._owes}", address=self.client)
            self._refuse(408, TOO_SLOW)

    def _unsupported_upgrade_warning(self) -> None:
        """Pass over it: who asks for another protocol may be answered in this one."""

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002 - uvicorn's, in plain text
        """Answer what is no HTTP."""
        self._refuse(400, NO_HTTP)

    def _refuse(self, status: int, detail: str) -> None:
        """Answer, if it is this request's turn, and close the connection."""
        turn = self._is_answered() if self._owes == "head" else not self.pipeline
        if turn and not (self._owes == "body" and self.cycle.response_started):
            answer = problem("", status, detail, headers={"Connection": "close"})
            lines = [b"%s: %s\r\n" % header for header in answer.raw_headers]
            head = [STATUS_LINE[status], *lines, b"\r\n"]
            self.transport.write(b"".join(head) + bytes(answer.body))
        self.transport.close()

    def _turn_away(self) -> None:
        if self._since - self._told_at >= TOLD_EVERY:
            Deadlines._told_at = self._since
            log.warning("too many clients", most=self.most)
        self._refuse(503, TOO_MANY)

    def _abort(self) -> None:
        """Close the connection, and let the system forget what it was still to send."""
        at_once = struct.pack("ii", 1, 0)
        connection = self.transport.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, at_once)
        self.transport.abort()

    def _is_answered(self) -> bool:
        """Whether every request so far is."""
        return self.cycle is None or self.cycle.response_complete
