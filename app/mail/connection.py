"""One connection to the SMTP server, and a mail over it in as few turns as the server allows."""

import asyncio
import contextlib
from typing import Any, cast

from aiosmtplib import (
    SMTP,
    SMTPException,
    SMTPReadTimeoutError,
    SMTPResponse,
    SMTPResponseException,
    SMTPServerDisconnected,
    SMTPStatus,
)
from aiosmtplib.protocol import SMTPProtocol

GOODBYE_SECONDS = 1.0  # for the answer to RSET and QUIT, which nobody's mail depends on
MOST_HEARD = 32 * 1024  # bytes kept of what nobody has read yet; a reply is a few hundred

_WANTED = {"MAIL": {250}, "RCPT": {250, 251}, "DATA": {354}}


class NotTaken(SMTPResponseException):
    """The answer to one of a mail's commands, or to its content, was not the one that goes on."""


class Connection(SMTP):
    """One SMTP connection; closing it is immediate, so that a closed one never counts.

    aiosmtplib opens it: the greeting, TLS, EHLO, the login. It closes politely: it flushes what is
    left to write, and over TLS waits 30 s for the peer's goodbye, even when the peer is what we are
    giving up on.
    """

    def __init__(
        self, open_connections: "set[Connection]", *, data_timeout: float, **settings: Any
    ) -> None:
        super().__init__(**settings)
        self._data_timeout = data_timeout
        self.has_answered = False  # since it was opened or last taken; goodbyes do not count
        self._replies = _Replies(connection_lost_callback=lambda _: self.close())
        self._open_connections = open_connections
        open_connections.add(self)

    async def open(self) -> None:
        """Connect, up to the server's answer to EHLO or to the login."""
        await self.connect()
        if self.is_ehlo_or_helo_needed:
            await self.ehlo()
        if self.transport is None:  # it hung up with its last answer
            raise SMTPServerDisconnected("Connection lost")
        self._replies.connection_made(self.transport)
        self.transport.set_protocol(self._replies)
        self.protocol = self._replies

    async def send(self, content: bytes, sender: str, recipient: str) -> SMTPResponse:
        """Hand over a mail, as it goes on the wire; both addresses are fit for a command line.

        Takes two turns where the server takes several commands in one (RFC 2920), and else four.
        """
        envelope = [f"MAIL FROM:<{sender}>", f"RCPT TO:<{recipient}>", "DATA"]
        if self.supports_extension("PIPELINING"):
            await self._say(*envelope)
        else:
            for command in envelope:
                await self._say(command)
        self._replies.write(content)
        reply = await self._hear(self._data_timeout)
        if reply.code != SMTPStatus.completed:
            raise NotTaken(*reply)
        return reply

    async def _say(self, *commands: str) -> None:
        """Say these in one go and hear the answer to each; raise NotTaken for the first refusal."""
        self._replies.write("".join(f"{command}\r\n" for command in commands).encode("ascii"))
        for said, command in enumerate(commands, start=1):
            reply = await self._hear(self.timeout)
            if reply.code not in _WANTED[command[:4]]:
                await self._hear_out(len(commands) - said)
                raise NotTaken(*reply)

    async def _hear(self, timeout: float | None) -> SMTPResponse:  # noqa: ASYNC109
        reply = await self._replies.read_response(timeout)
        if reply.code == SMTPStatus.domain_unavailable:  # 421: it hangs up (RFC 5321, 3.8)
            self.close()
            raise NotTaken(*reply)
        self.has_answered = True
        return reply

    async def _hear_out(self, answers: int) -> None:
        """Hear what is answered to the commands after one that was refused; or else close.

        DATA may have been granted without a recipient: an empty mail ends it (RFC 2920, 3.1).
        """
        try:
            for _ in range(answers):
                reply = await self._hear(GOODBYE_SECONDS)
                if reply.code == SMTPStatus.start_input:
                    self._replies.write(b".\r\n")
                    await self._hear(GOODBYE_SECONDS)
        except SMTPException:
            self.close()

    async def reset(self) -> None:
        """RSET after a refusal, for the next mail's sake (RFC 5321, 4.1.1.5); or else close."""
        try:
            await self.rset(timeout=GOODBYE_SECONDS)
        except SMTPException:
            self.close()
        except asyncio.CancelledError:
            self.close()
            raise

    async def leave(self) -> None:
        """QUIT (RFC 5321, 4.1.1.10), and close whatever the answer."""
        try:
            with contextlib.suppress(SMTPException):
                await self.quit(timeout=GOODBYE_SECONDS)
        finally:
            self.close()

    def close(self) -> None:
        """Hang up."""
        if self.transport is not None:
            cast(asyncio.WriteTransport, self.transport).abort()
        super().close()
        self._open_connections.discard(self)


class _Replies(SMTPProtocol):
    """Keeps replies until they are asked for; aiosmtplib's own loses what comes before that.

    Whatever the server says unasked ends the connection at the next command: nobody could tell any
    longer which reply is to what.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self._heard = b""
        self._more = asyncio.Event()

    def write(self, data: bytes) -> None:
        if self._heard:
            raise SMTPServerDisconnected("The server spoke out of turn")
        super().write(data)

    async def read_response(
        self,
        timeout: float | None = None,  # noqa: ASYNC109 -- the base's signature
    ) -> SMTPResponse:
        """Give the next reply, which has come or has to come within `timeout` seconds."""
        return self._next() or await self._wait(timeout)

    async def _wait(self, timeout: float | None) -> SMTPResponse:  # noqa: ASYNC109
        try:
            async with asyncio.timeout(timeout):
                while not (reply := self._next()):
                    self._more.clear()
                    await self._more.wait()
        except TimeoutError as error:
            raise SMTPReadTimeoutError("Timed out") from error
        return reply

    def _next(self) -> SMTPResponse | None:
        lines, start = [], 0
        while (end := self._heard.find(b"\n", start)) >= 0:
            line, start = self._heard[start:end], end + 1
            if not line[:3].isdigit():
                raise SMTPResponseException(SMTPStatus.invalid_response, "Malformed")
            lines.append(line[4:].strip())
            if line[3:4] != b"-":
                self._heard = self._heard[start:]
                text = b"\n".join(lines).decode("utf-8", "surrogateescape")
                return SMTPResponse(int(line[:3]), text)
        if not self.is_connected:
            raise SMTPServerDisconnected("Connection lost")
        return None

    def data_received(self, data: bytes) -> None:
        if len(self._heard) < MOST_HEARD:
            self._heard += data
        self._more.set()

    def eof_received(self) -> bool:
        cast(asyncio.WriteTransport, self.transport).abort()
        return super().eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._more.set()
