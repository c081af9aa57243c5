"""An SMTP server that refuses, defers, hangs, drops or drips at any stage, on request."""

import asyncio
import contextlib
import ssl
from collections import defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

from anyio.from_thread import BlockingPortal, start_blocking_portal

HANG = "hang"  # send nothing until the client closes the connection
DEAF = "deaf"  # send nothing, and stop reading, so that the client's close goes unnoticed
DROP = "drop"  # close the connection without a reply
DRIP = "drip"  # send a byte every 50 ms, and never a complete line
TRICKLE = "trickle"  # send a line of a reply every 50 ms, and never its last line

USUAL = {
    "connect": "220 test ESMTP",
    "ehlo": "250-test\r\n250-PIPELINING\r\n250-8BITMIME\r\n250 AUTH PLAIN",
    "starttls": "220 2.0.0 Ready",
    "auth": "235 2.7.0 Welcome",
    "mail": "250 2.1.0 Ok",
    "rcpt": "250 2.1.5 Ok",
    "data": "354 Go ahead",
    "dot": "250 2.0.0 Ok",
    "rset": "250 2.0.0 Ok",
    "noop": "250 2.0.0 Ok",
    "quit": "221 2.0.0 Bye",
    "too early": "503 5.5.1 Not yet",
}


@dataclass(frozen=True)
class Received:
    """A mail that arrived up to its final dot, accepted or not."""

    sender: str
    recipients: tuple[str, ...]
    content: bytes  # as received, without the final dot


class SmtpServer:
    """Listens on loopback, counts connections, and keeps command lines and mails.

    `always` and `once` set its replies by stage (see USUAL): a reply, or HANG, DEAF, DROP, DRIP or
    TRICKLE. `delay` delays the replies of a stage, in seconds. All three may change while the
    server runs. A test may make it offer STARTTLS without a certificate (`always["ehlo"]`): then it
    accepts the command, and never begins TLS.
    """

    def __init__(
        self, *, starttls: ssl.SSLContext | None = None, tls: ssl.SSLContext | None = None
    ) -> None:
        self.port = 0  # chosen by the system at the first start, then kept
        self.starttls = starttls
        self.tls = tls
        self.always: dict[str, str] = {}
        if starttls:
            self.always["ehlo"] = "250-test\r\n250-STARTTLS\r\n250 AUTH PLAIN"
        self.once: defaultdict[str, deque[str]] = defaultdict(deque)
        self.delay: dict[str, float] = {}
        self.received: list[Received] = []
        self.commands: list[str] = []
        self.open_now = self.open_most = self.open_total = 0
        self._server: asyncio.Server | None = None
        self._sessions: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Start listening, after a restart at the same port."""
        self._server = await asyncio.start_server(
            self._serve, "127.0.0.1", self.port, ssl=self.tls, limit=1 << 24
        )
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Stop listening, and cut all open connections."""
        assert self._server is not None
        self._server.close()
        await self.drop_connections()
        await self._server.wait_closed()

    async def drop_connections(self) -> None:
        """Cut all open connections without a reply."""
        sessions = list(self._sessions)
        for session in sessions:
            session.cancel()
        await asyncio.gather(*sessions, return_exceptions=True)

    async def __aenter__(self) -> Self:  # noqa: D105
        await self.start()
        return self

    async def __aexit__(self, *exception: object) -> None:  # noqa: D105
        await self.stop()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        session = asyncio.current_task()
        assert session is not None
        self._sessions.add(session)
        self.open_total += 1
        self.open_now += 1
        self.open_most = max(self.open_most, self.open_now)
        try:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError):
                await self._converse(reader, writer)
        finally:
            self.open_now -= 1
            self._sessions.discard(session)
            writer.transport.abort()

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        sender, recipients = "", list[str]()
        stage = "connect"
        await self._answer(stage, reader, writer)
        while stage != "quit":
            line = (await reader.readuntil(b"\r\n")).decode().removesuffix("\r\n")
            self.commands.append(line)
            verb, _, argument = line.partition(" ")
            stage = verb.lower()
            if (stage == "rcpt" and not sender) or (stage == "data" and not recipients):
                stage = "too early"
            accepted = await self._answer(stage, reader, writer)
            match stage:
                case "mail" if accepted:
                    sender, recipients = argument[len("FROM:<") : -1], []
                case "rset":
                    sender, recipients = "", []
                case "rcpt" if accepted:
                    recipients.append(argument[len("TO:<") : -1])
                case "data" if accepted:
                    content = []
                    while (text := await reader.readuntil(b"\r\n")) != b".\r\n":
                        content.append(text)
                    self.received.append(Received(sender, tuple(recipients), b"".join(content)))
                    await self._answer("dot", reader, writer)
                    sender, recipients = "", []
                case "starttls" if accepted and self.starttls:
                    await writer.start_tls(self.starttls)
                case "starttls" if accepted:
                    self.commands.append((await reader.read()).decode("latin-1"))

    async def _answer(
        self, stage: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> bool:
        """Send the scripted or the usual reply. Return whether it accepts the command."""
        await asyncio.sleep(self.delay.get(stage, 0))
        usual = USUAL.get(stage, "500 5.5.1 What?")
        answer = self.always.get(stage, usual)
        if self.once[stage]:
            answer = self.once[stage].popleft()
        if answer in {DRIP, TRICKLE}:
            while not reader.at_eof():
                writer.write(b"2" if answer == DRIP else b"250-\r\n")
                await asyncio.sleep(0.05)
        if answer == HANG:
            await reader.read()
        if answer == DEAF:
            writer.transport.pause_reading()  # type: ignore[attr-defined]
            await asyncio.get_running_loop().create_future()
        if answer in {DROP, DRIP, TRICKLE, HANG}:
            raise ConnectionAbortedError
        writer.write(answer.encode() + b"\r\n")
        await writer.drain()
        if answer.startswith("421"):
            raise ConnectionAbortedError
        return answer[0] == usual[0]


@contextlib.contextmanager
def in_a_thread(server: SmtpServer) -> Iterator[BlockingPortal]:
    """Run a server in a thread, for a test that is not async.

    Such a test controls it with, for example, `portal.call(server.stop)`.
    """
    with start_blocking_portal() as portal, portal.wrap_async_context_manager(server):
        yield portal
