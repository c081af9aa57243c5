"""One connection to the SMTP server, and a mail over it in as few turns as the server allows."""

import asyncio
import contextlib
import re
import ssl
from ipaddress import ip_address
from typing import Any, cast

from aiosmtplib import (
    SMTP,
    SMTPConnectResponseError,
    SMTPException,
    SMTPHeloError,
    SMTPReadTimeoutError,
    SMTPResponse,
    SMTPResponseException,
    SMTPServerDisconnected,
    SMTPStatus,
)
from aiosmtplib.protocol import SMTPProtocol

from app.mail.dial import dial

GOODBYE_SECONDS = 1.0  # for the answers to RSET and QUIT, because no mail depends on them
MOST_HEARD = 32 * 1024  # bytes kept of replies that are still unread; a reply is a few hundred

# The first digit of the reply that goes on. A client must understand a code that it does not know
# by its first digit (RFC 5321, 4.2).
_POSITIVE, _INTERMEDIATE = 2, 3
_WANTED = {"MAIL": _POSITIVE, "RCPT": _POSITIVE, "DATA": _INTERMEDIATE}
# aiosmtplib compares whole codes. It is given the code that it looks for, by the command.
_CODES = {
    b"EHLO": {_POSITIVE: SMTPStatus.completed},
    b"HELO": {_POSITIVE: SMTPStatus.completed},
    b"RSET": {_POSITIVE: SMTPStatus.completed},
    b"NOOP": {_POSITIVE: SMTPStatus.completed},
    b"QUIT": {_POSITIVE: SMTPStatus.closing},
}
_LOGIN_CODES = {
    _POSITIVE: SMTPStatus.auth_successful,
    _INTERMEDIATE: SMTPStatus.auth_continue,
}
_UNKNOWN_COMMAND = {500, 502}

# A name with a dot, whose last label is no number (RFC 1123, 2.1).
_QUALIFIED_NAME = re.compile(
    r"(?=.{1,253}$)([a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\.)+[a-z]([a-z0-9-]{0,61}[a-z0-9])?",
    re.ASCII | re.IGNORECASE,
)


class NotTaken(SMTPResponseException):
    """The answer to one of a mail's commands, or to its content, was not the one that goes on."""


def is_qualified(name: str) -> bool:
    """Tell whether a host's name is fully qualified, as servers want it in EHLO."""
    return _QUALIFIED_NAME.fullmatch(name) is not None


def address_literal(address: str) -> str:
    """Write an IP address as a client without a name does in EHLO (RFC 5321, 4.1.3 and 4.1.4)."""
    parsed = ip_address(address.partition("%")[0])  # without the name of an interface
    return f"[IPv6:{parsed}]" if parsed.version == 6 else f"[{parsed}]"  # noqa: PLR2004


class Connection(SMTP):
    """One SMTP connection; closing it is immediate, so that a closed one never counts.

    aiosmtplib says EHLO, begins TLS and logs in. The connecting and the closing are our own: it
    knows one address of a host, compares whole codes, and closes politely: it flushes what is left
    to write, and over TLS waits 30 s for a goodbye, even of a server that we are giving up on.

    `local_hostname` is the name for EHLO. Without one, the connection says its own address: servers
    refuse a name that is not fully qualified.
    """

    def __init__(  # noqa: PLR0913 -- each is named where it is given
        self,
        open_connections: "set[Connection]",
        *,
        host: str,
        port: int,
        login: tuple[str, str] | None,
        tls: ssl.SSLContext | None,
        starttls: bool,
        local_hostname: str | None,
        timeout: float,
        data_timeout: float,
    ) -> None:
        super().__init__(
            hostname=host,
            port=port,
            local_hostname=local_hostname,
            timeout=timeout,
            use_tls=tls is not None and not starttls,
            start_tls=starttls,
            tls_context=tls,
        )
        self._host = host
        self._port = port
        self._login = login
        self._tls = tls
        self._starttls = starttls
        self._step_timeout = timeout
        self._data_timeout = data_timeout
        self.is_ready = False  # for mails; it stays so until it is closed
        self.has_answered = False  # since it was opened or last taken; goodbyes do not count
        self._replies = _Replies(connection_lost_callback=lambda _: self.close())
        self._open_connections = open_connections
        open_connections.add(self)

    async def open(self) -> None:
        """Connect, hear the greeting, begin TLS, say EHLO and log in; each within the timeout.

        Raises OSError, SMTPException, or UnicodeError for a host that cannot be looked up.
        """
        await self._connect()
        greeting = await self._replies.read_response(self._step_timeout)
        if greeting.code // 100 != _POSITIVE:
            raise SMTPConnectResponseError(*greeting)
        if self._starttls:
            await self._say_hello()
            await self.starttls()
        await self._say_hello()
        if self._login:
            await self.login(*self._login)
        if not self.is_connected:  # the server hung up with its last answer
            raise SMTPServerDisconnected("Connection lost")
        self.is_ready = True

    async def _connect(self) -> None:
        async with asyncio.timeout(self._step_timeout):
            socket = await dial(self._host, self._port)
            if self.local_hostname is None:
                self.local_hostname = address_literal(socket.getsockname()[0])
            direct_tls = self._tls if self.use_tls else None
            try:
                transport, _ = await asyncio.get_running_loop().create_connection(
                    lambda: self._replies,
                    sock=socket,
                    ssl=direct_tls,
                    server_hostname=self._host if direct_tls else None,
                )
            except BaseException:
                socket.close()
                raise
        self.transport, self.protocol = transport, self._replies

    async def _say_hello(self) -> None:
        """EHLO, or HELO where the server does not know EHLO (RFC 5321, 3.2)."""
        try:
            await self.ehlo()
        except SMTPHeloError as error:
            if error.code not in _UNKNOWN_COMMAND:
                raise
            await self.helo()

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
        if reply.code // 100 != _POSITIVE:
            raise NotTaken(*reply)
        return reply

    async def _say(self, *commands: str) -> None:
        """Say these in one go and hear the answer to each; raise NotTaken for the first refusal."""
        self._replies.write("".join(f"{command}\r\n" for command in commands).encode("ascii"))
        for said, command in enumerate(commands, start=1):
            reply = await self._hear(self.timeout)
            if reply.code // 100 != _WANTED[command[:4]]:
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
                if reply.code // 100 == _INTERMEDIATE:
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
        self.is_ready = False
        self._open_connections.discard(self)


class _Replies(SMTPProtocol):
    """Keeps replies until they are asked for; aiosmtplib's own loses what comes before that.

    A reply that was not asked for ends the connection at the next command, because replies could no
    longer be matched with commands. That holds for text injected before TLS as well (RFC 3207, 6).
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self._heard = b""
        self._more = asyncio.Event()
        self._awaits_starttls = False

    def write(self, data: bytes) -> None:
        if self._heard:
            raise SMTPServerDisconnected("The server spoke out of turn")
        super().write(data)

    async def execute_command(
        self,
        *args: bytes,
        timeout: float | None = None,  # noqa: ASYNC109 -- the base's signature
    ) -> SMTPResponse:
        """Say a command, and give its reply with the code that aiosmtplib compares with."""
        reply = await super().execute_command(*args, timeout=timeout)
        codes = _CODES.get(args[0], _LOGIN_CODES)
        return SMTPResponse(codes.get(reply.code // 100, reply.code), reply.message)

    async def start_tls(
        self,
        tls_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,  # noqa: ASYNC109 -- the base's signature
    ) -> SMTPResponse:
        """Say STARTTLS, and begin TLS if any code of success is the reply."""
        self._awaits_starttls = True
        try:
            return await super().start_tls(tls_context, server_hostname, timeout)
        finally:
            self._awaits_starttls = False

    async def read_response(
        self,
        timeout: float | None = None,  # noqa: ASYNC109 -- the base's signature
    ) -> SMTPResponse:
        """Give the next reply, which has come or has to come within `timeout` seconds."""
        reply = self._next() or await self._wait(timeout)
        if self._awaits_starttls and reply.code // 100 == _POSITIVE:
            return SMTPResponse(SMTPStatus.ready, reply.message)
        return reply

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
