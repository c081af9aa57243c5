"""The server: uvicorn, with deadlines for slow clients and bounds on what they send.

It also answers clients that close their sending side, and clients that speak HTTP/1.0.
"""

import asyncio
import contextlib
import fcntl
import os
import resource
import signal
import socket
import struct
from ipaddress import ip_address
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import structlog
import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import (
    STATUS_LINE,
    HttpToolsProtocol,
    RequestResponseCycle,
)

from app.api.errors import problem
from app.listening import CannotListen, authority, bind
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
    """Serve until SIGTERM or SIGINT. Raises CannotListen before the app has started."""
    sockets = _bind(settings)

    class Protocol(Deadlines):
        seconds = settings.client_timeout_seconds
        most = most_clients()

    config = uvicorn.Config(
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
        timeout_keep_alive=settings.keep_alive_seconds,
        timeout_graceful_shutdown=max(1, round(settings.shutdown_grace_seconds)),
    )
    with contextlib.ExitStack() as closed_at_the_end:  # also where the app does not start
        for opened in sockets:
            closed_at_the_end.enter_context(opened)
        Server(config, settings).run(sockets)


class Server(uvicorn.Server):
    """uvicorn on sockets that are open already, which says where the pages are."""

    def __init__(self, config: uvicorn.Config, settings: Settings) -> None:
        super().__init__(config)
        self._settings = settings

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop at a signal. After Ctrl-C, a second one ends the process at once, as a kill does."""
        super().handle_exit(sig, frame)
        if sig == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start the app, then accept connections."""
        await super().startup(sockets)
        assert sockets
        self._log_started_message(sockets)  # uvicorn leaves it out for sockets it did not open
        at = url(self._settings, sockets[0].getsockname()[1])
        inbox = {"inbox": f"{at}inbox"} if self._settings.catcher else {}
        log.info("ready", at=at, docs=f"{at}docs", **inbox)


def url(settings: Settings, port: int) -> str:
    """Give the address at which a browser on this machine finds the pages, with a final slash."""
    host = "localhost" if _is_any_address(settings.host) else settings.host
    return f"http://{authority(host, port)}{settings.root_path or ''}/"


def _is_any_address(host: str) -> bool:
    """Whether a server listens on every address of the machine at this one."""
    try:
        return ip_address(host).is_unspecified
    except ValueError:
        return False


def _bind(settings: Settings) -> list[socket.socket]:
    try:
        return bind(settings.host, settings.port)
    except CannotListen as error:
        owner = _owner_of_the_queue(settings.queue_url)
        if owner is None or (error.processes and owner not in error.processes):
            raise
        raise CannotListen(
            f"the service already runs here, as process {owner} at "
            f"{url(settings, settings.port)}. Stop it with: kill {owner}",
            error.processes,
        ) from error


def _owner_of_the_queue(queue_url: str) -> int | None:
    """Find the running process that has locked the SQLite file of this queue."""
    if not queue_url.startswith("sqlite:///"):
        return None
    lock_file = Path(os.path.realpath(queue_url.removeprefix("sqlite:///")) + ".lock")
    with contextlib.suppress(OSError, ValueError), lock_file.open() as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return int(lock.read())
    return None


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
        self._half_closed = False
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

    def eof_received(self) -> bool:  # type: ignore[override]
        """Keep the connection open for the answers to complete requests; returns whether there are.

        The client has closed its sending side. What it has not sent completely can never be, so an
        incomplete request is dropped at once.
        """
        self._half_closed = True
        self._expect(None)
        if self._is_answered():
            return False
        if self.cycle.more_body:
            if not self.pipeline:
                return False
            self.pipeline.popleft()  # the newest; the one before it is complete
        self.cycle.keep_alive = False
        return True

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
        if self.scope["http_version"] == "1.0":
            self.cycle.keep_alive = self.parser.should_keep_alive()  # where the client asks for it
            self.cycle.waiting_for_100_continue = False  # RFC 9110, 10.1.1: it knows no 1xx
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
        if self._half_closed and self._has_failed():
            self._abort()
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
        self._socket().setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, at_once)
        self.transport.abort()

    def _has_failed(self) -> bool:
        """Tell whether a half-closed client turned out to be gone.

        Both look the same until the service sends something: then the system of a client that is
        gone answers with a reset. The event loop hears of it only with the next write, because it
        no longer reads from this client.
        """
        return bool(self._socket().getsockopt(socket.SOL_SOCKET, socket.SO_ERROR))

    def _socket(self) -> Any:
        return self.transport.get_extra_info("socket")

    def _is_answered(self) -> bool:
        """Whether every request so far is."""
        return self.cycle is None or self.cycle.response_complete


class WithoutChunks:
    """An app for one request of HTTP/1.0, which has no chunks (RFC 9112, 6.1).

    Where an answer has no Content-Length, the end of the connection ends its body. `cycle` is
    uvicorn's side of the request, which would send chunks.
    """

    def __init__(self, app: ASGIApp, cycle: RequestResponseCycle) -> None:
        self._app = app
        self._cycle = cycle
        self._until_the_end = False

    async def __call__(self, scope: Scope, receive: Receive, _: Send) -> None:
        """Serve the request (ASGI)."""
        await self._app(scope, receive, self._send)

    async def _send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            message = self._framed(message)
        elif self._until_the_end:
            # uvicorn compares each part of a body with the length that was announced.
            self._cycle.expected_content_length = len(message.get("body", b""))
        await self._cycle.send(message)  # type: ignore[arg-type]

    def _framed(self, start: Message) -> Message:
        """Decide what ends the body, and tell a client that asked whether it may ask again."""
        headers = list(start.get("headers", ()))
        names = {name.lower() for name, _ in headers}
        has_body = self._cycle.scope["method"] != "HEAD" and start["status"] not in (204, 304)
        self._until_the_end = has_body and b"content-length" not in names
        if self._until_the_end:
            self._cycle.chunked_encoding = False
            self._cycle.keep_alive = False
        elif self._cycle.keep_alive and b"connection" not in names:
            headers.append((b"connection", b"keep-alive"))
        return {**start, "headers": headers}
