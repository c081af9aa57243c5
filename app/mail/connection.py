"""One connection to the SMTP server. It sends a mail in as few round trips as the server allows."""

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

GOODBYE_SECONDS = 1.0  # to wait for the replies to RSET and QUIT, because no mail depends on them
MOST_UNREAD = 32 * 1024  # bytes of unread replies that are kept; a reply has a few hundred

# First digits of replies. A client that does not know a code must go by its first digit (RFC 5321,
# 4.2): 2 is success, and 3 asks for more, as 354 asks for the content.
_POSITIVE, _INTERMEDIATE = 2, 3
_EXPECTED = {
    "MAIL": _POSITIVE,
    "RCPT": _POSITIVE,
    "DATA": _INTERMEDIATE,
    "NOOP": _POSITIVE,
}
# aiosmtplib compares whole codes. So a reply with the right first digit gets the code that
# aiosmtplib expects for the command: a server's `250` to QUIT becomes `221`.
_CODES = {
    b"EHLO": {_POSITIVE: SMTPStatus.completed},
    b"HELO": {_POSITIVE: SMTPStatus.completed},
    b"RSET": {_POSITIVE: SMTPStatus.completed},
    b"QUIT": {_POSITIVE: SMTPStatus.closing},
}
_LOGIN_CODES = {
    _POSITIVE: SMTPStatus.auth_successful,
    _INTERMEDIATE: SMTPStatus.auth_continue,
}
_UNKNOWN_COMMAND = {500, 502}

# A name with a dot. Its last label is not a number (RFC 1123, 2.1).
_QUALIFIED_NAME = re.compile(
    r"(?=.{1,253}$)([a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\.)+[a-z]([a-z0-9-]{0,61}[a-z0-9])?",
    re.ASCII | re.IGNORECASE,
)


class UnexpectedReply(SMTPResponseException):
    """The server refused a command or the content: the first digit is not the expected."""


def is_qualified(name: str) -> bool:
    """Return whether a host name is fully qualified. Some servers require this in EHLO."""
    return _QUALIFIED_NAME.fullmatch(name) is not None


def address_literal(address: str) -> str:
    """Return an IP address in the form for EHLO, such as `[192.0.2.1]` (RFC 5321, 4.1.3, 4.1.4)."""
    parsed = ip_address(address.partition("%")[0])  # fe80::1%eth0: without the interface
    return f"[IPv6:{parsed}]" if parsed.version == 6 else f"[{parsed}]"  # noqa: PLR2004


class Connection(SMTP):
    """One SMTP connection.

    aiosmtplib provides EHLO, TLS and the login. Three things are our own:

    - Connecting: aiosmtplib tries only one address of a host.
    - Reading replies: aiosmtplib compares whole codes, and loses replies that come early.
    - Closing: aiosmtplib flushes its buffer, and over TLS waits 30 s for the server's goodbye, even
      after a time-out. Here `close` is immediate, so the connection no longer counts against the
      limit.

    Args:
        open_connections: the pool's set. The connection adds itself, and removes itself on `close`.
        local_hostname: the name for EHLO. None means this end's IP address, because servers refuse
            a name that is not fully qualified.
        timeout: seconds for each step: to connect, to begin TLS, for the reply to a command.
        data_timeout: seconds for the reply to the content.
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
        self.is_ready = False  # True from the end of `open` until `close`
        # Whether the server has replied to a command of `send` or `check` since the pool last set
        # this to False. A 421, which closes the connection, does not count.
        self.has_answered = False
        self._channel = _Channel(connection_lost_callback=lambda _: self.close())
        self._open_connections = open_connections
        open_connections.add(self)

    async def open(self) -> None:
        """Connect, read the greeting, begin TLS, send EHLO and log in. Each has the timeout.

        Raises OSError, SMTPException, or UnicodeError if the host's name has no form for the DNS.
        """
        await self._connect()
        greeting = await self._channel.read_response(self._step_timeout)
        if greeting.code // 100 != _POSITIVE:
            raise SMTPConnectResponseError(*greeting)
        if self._starttls:
            await self._greet()
            await self.starttls()
        await self._greet()  # again after STARTTLS (RFC 3207, 4.2)
        if self._login:
            await self.login(*self._login)
        if not self.is_connected:  # the server closed the connection with its last reply
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
                    lambda: self._channel,
                    sock=socket,
                    ssl=direct_tls,
                    server_hostname=self._host if direct_tls else None,
                )
            except BaseException:
                socket.close()
                raise
        self.transport, self.protocol = transport, self._channel

    async def _greet(self) -> None:
        """Send EHLO, or HELO if the server does not know EHLO (RFC 5321, 3.2)."""
        try:
            await self.ehlo()
        except SMTPHeloError as error:
            if error.code not in _UNKNOWN_COMMAND:
                raise
            await self.helo()

    async def send(self, content: bytes, sender: str, recipient: str) -> SMTPResponse:
        """Send one mail, and return the reply to its content.

        `content` has CRLF line ends, doubled dots and the final dot. Both addresses must be fit for
        a command line. Raises UnexpectedReply, SMTPException or OSError.

        With PIPELINING (RFC 2920) a mail takes two round trips, and without it four:

            client: MAIL FROM:<notifications@example.com>, RCPT TO:<ada@example.org>, DATA
            server: 250 2.1.0 Ok, 250 2.1.5 Ok, 354 End data with <CR><LF>.<CR><LF>
            client: the content, up to the line with a single dot
            server: 250 2.0.0 Ok: queued as 7F3A
        """
        # 1. Send the envelope, and wait until the server asks for the content.
        envelope = [f"MAIL FROM:<{sender}>", f"RCPT TO:<{recipient}>", "DATA"]
        if self.supports_extension("PIPELINING"):
            await self._send_commands(*envelope)
        else:
            for command in envelope:
                await self._send_commands(command)
        # 2. Send the content, and wait until the server has accepted it.
        self._channel.write(content)
        reply = await self._read_reply(self._data_timeout)
        if reply.code // 100 != _POSITIVE:
            raise UnexpectedReply(*reply)
        return reply

    async def check(self) -> SMTPResponse:
        """Send NOOP, and return the reply. Raises UnexpectedReply, SMTPException or OSError."""
        return await self._send_commands("NOOP")

    async def _send_commands(self, *commands: str) -> SMTPResponse:
        """Send all commands in one write, read the reply to each, and return the last one.

        Raises UnexpectedReply for the first refusal, once the later replies are read as well.
        """
        self._channel.write("".join(f"{command}\r\n" for command in commands).encode("ascii"))
        for number, command in enumerate(commands, start=1):
            reply = await self._read_reply(self.timeout)
            if reply.code // 100 != _EXPECTED[command[:4]]:
                await self._skip_replies(len(commands) - number)
                raise UnexpectedReply(*reply)
        return reply

    async def _read_reply(self, timeout: float | None) -> SMTPResponse:  # noqa: ASYNC109
        reply = await self._channel.read_response(timeout)
        # With 421 a server announces that it closes the connection (RFC 5321, 3.8).
        if reply.code == SMTPStatus.domain_unavailable:
            self.close()
            raise UnexpectedReply(*reply)
        self.has_answered = True
        return reply

    async def _skip_replies(self, count: int) -> None:
        """Read the replies to the commands after a refused one. If they do not come, close.

        For example, the server refuses RCPT with 550 and grants DATA with 354 all the same. Then it
        waits for a mail without recipients. A single dot ends that mail (RFC 2920, 3.1).
        """
        try:
            for _ in range(count):
                reply = await self._read_reply(GOODBYE_SECONDS)
                if reply.code // 100 == _INTERMEDIATE:
                    self._channel.write(b".\r\n")
                    await self._read_reply(GOODBYE_SECONDS)
        except SMTPException:
            self.close()

    async def reset(self) -> None:
        """Send RSET after a refusal, so that the next mail starts clean (RFC 5321, 4.1.1.5).

        Closes the connection if the server does not confirm it.
        """
        try:
            await self.rset(timeout=GOODBYE_SECONDS)
        except SMTPException:
            self.close()
        except asyncio.CancelledError:
            self.close()
            raise

    async def quit_and_close(self) -> None:
        """Send QUIT (RFC 5321, 4.1.1.10), and close the connection whether or not a reply comes."""
        try:
            with contextlib.suppress(SMTPException):
                await self.quit(timeout=GOODBYE_SECONDS)
        finally:
            self.close()

    def close(self) -> None:
        """Close the connection at once, without QUIT and without flushing."""
        if self.transport is not None:
            cast(asyncio.WriteTransport, self.transport).abort()
        super().close()
        self.is_ready = False
        self._open_connections.discard(self)


class _Channel(SMTPProtocol):
    """Writes commands, and keeps the server's replies until they are read.

    aiosmtplib's own protocol loses replies that arrive before they are read, so it cannot pipeline.

    A write while an unread reply is left raises an error, because from then on no reply could be
    matched with its command. This also stops replies that an attacker injected before TLS began
    (RFC 3207, 6).
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self._unread = b""
        self._data_arrived = asyncio.Event()
        self._awaits_starttls = False

    def write(self, data: bytes) -> None:
        if self._unread:
            raise SMTPServerDisconnected("The server spoke out of turn")
        super().write(data)

    async def execute_command(
        self,
        *args: bytes,
        timeout: float | None = None,  # noqa: ASYNC109 -- the base's signature
    ) -> SMTPResponse:
        """Send a command, and return its reply with the code that aiosmtplib expects."""
        reply = await super().execute_command(*args, timeout=timeout)
        codes = _CODES.get(args[0], _LOGIN_CODES)
        return SMTPResponse(codes.get(reply.code // 100, reply.code), reply.message)

    async def start_tls(
        self,
        tls_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,  # noqa: ASYNC109 -- the base's signature
    ) -> SMTPResponse:
        """Send STARTTLS, and begin TLS if the reply has any code of success."""
        self._awaits_starttls = True
        try:
            return await super().start_tls(tls_context, server_hostname, timeout)
        finally:
            self._awaits_starttls = False

    async def read_response(
        self,
        timeout: float | None = None,  # noqa: ASYNC109 -- the base's signature
    ) -> SMTPResponse:
        """Return the next reply. Raises SMTPReadTimeoutError if none comes within the timeout."""
        reply = self._next_reply() or await self._wait_for_reply(timeout)
        if self._awaits_starttls and reply.code // 100 == _POSITIVE:
            return SMTPResponse(SMTPStatus.ready, reply.message)
        return reply

    async def _wait_for_reply(self, timeout: float | None) -> SMTPResponse:  # noqa: ASYNC109
        try:
            async with asyncio.timeout(timeout):
                while not (reply := self._next_reply()):
                    self._data_arrived.clear()
                    await self._data_arrived.wait()
        except TimeoutError as error:
            raise SMTPReadTimeoutError("Timed out") from error
        return reply

    def _next_reply(self) -> SMTPResponse | None:
        """Take one whole reply from the buffer, or return None if its end has not arrived.

        For example, `250-mail.example.com`, `250-PIPELINING` and `250 SMTPUTF8` are three lines of
        one reply: a hyphen behind the code says that another line follows (RFC 5321, 4.2.1).
        """
        lines, start = [], 0
        while (end := self._unread.find(b"\n", start)) >= 0:
            line, start = self._unread[start:end], end + 1
            if not line[:3].isdigit():
                raise SMTPResponseException(SMTPStatus.invalid_response, "Malformed")
            lines.append(line[4:].strip())
            if line[3:4] != b"-":  # the last line
                self._unread = self._unread[start:]
                text = b"\n".join(lines).decode("utf-8", "surrogateescape")
                return SMTPResponse(int(line[:3]), text)
        if not self.is_connected:
            raise SMTPServerDisconnected("Connection lost")
        return None

    def data_received(self, data: bytes) -> None:
        if len(self._unread) < MOST_UNREAD:
            self._unread += data
        self._data_arrived.set()

    def eof_received(self) -> bool:
        cast(asyncio.WriteTransport, self.transport).abort()
        return super().eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._data_arrived.set()
