"""Hand mails to the SMTP server over a few warm connections, never more than so many at once."""

import asyncio
import contextlib
import re
import socket
import ssl
from collections.abc import AsyncIterator
from email.message import EmailMessage
from typing import Any, Literal, cast

from aiosmtplib import (
    SMTP,
    SMTPDataError,
    SMTPException,
    SMTPResponse,
    SMTPResponseException,
    SMTPSenderRefused,
    SMTPServerDisconnected,
    SMTPStatus,
)
from aiosmtplib.protocol import SMTPProtocol

from app.mail.message import address
from app.mail.replies import classify, one_line

Security = Literal["none", "starttls", "tls"]

IDLE_SECONDS = 30.0  # well below the 300 after which servers hang up (RFC 5321, 4.5.3.2.7)
GOODBYE_SECONDS = 1.0  # for the answer to RSET and QUIT, which nobody's mail depends on
CHECK_SECONDS = 2.0
CHECK_CACHE_SECONDS = 1.0


class Mailer:
    """The way to one SMTP server: at most `connections` open at once, kept warm between mails.

    `timeout` is in seconds, for each step (connecting, TLS, each command's answer); `data_timeout`
    for the answer to the final dot, where haste makes duplicates (RFC 5321, 4.5.3.2.6; RFC 1047).
    `starttls` insists on STARTTLS. Certificates are checked against the system's authorities
    (`SSL_CERT_FILE` names others).
    """

    def __init__(
        self,
        *,
        host: str,
        port: int,
        username: str | None = None,
        password: str | None = None,
        security: Security = "none",
        timeout: float = 30,
        data_timeout: float = 600,
        connections: int = 10,
    ) -> None:
        self._host = host
        self._port = port
        self._username = username
        self._password = password
        self._security = security
        self._tls = None if security == "none" else ssl.create_default_context()
        self._local_hostname = _local_hostname()
        self._timeout = timeout
        self._data_timeout = data_timeout

        self._slots = asyncio.Semaphore(connections)  # whoever uses or opens a connection has one
        self._open: set[_Connection] = set()
        self._idle: dict[_Connection, asyncio.Task[None]] = {}  # each with its retirement
        self._reachable = False
        self._checking = asyncio.Lock()
        self._check_again_at = 0.0

    async def send(self, message: EmailMessage, *, sender: str, recipient: str) -> str:
        """Send one mail to one recipient; return the server's last reply, such as `250 2.0.0 Ok`.

        Waits for a free connection. Raises MailDeferred or MailRefused; the server may have taken
        the mail even so, if its answer to the final dot was lost.
        """
        try:
            content = _on_the_wire(message.as_bytes())
            # aiosmtplib parses what it is given, and of `a@x> <b@y` would take the second.
            sender, recipient = address(sender), address(recipient)
            async with self._slots:
                reply = await self._deliver(content, sender, recipient)
        except Exception as error:
            raise classify(error) from error
        return one_line(str(reply))

    async def _deliver(self, content: bytes, sender: str, recipient: str) -> SMTPResponse:
        if warm := self._take_idle():
            with contextlib.suppress(_HungUpError):
                return await self._converse(warm, content, sender, recipient)
        return await self._converse(await self._connect(), content, sender, recipient)

    async def _converse(
        self, connection: "_Connection", content: bytes, sender: str, recipient: str
    ) -> SMTPResponse:
        async with self._using(connection):
            await connection.begin(sender)
            await connection.rcpt(recipient)
            return await connection.finish(content, dot_timeout=self._data_timeout)

    def _take_idle(self) -> "_Connection | None":
        while self._idle:
            # The newest: under light load the others are left to retire.
            connection, retirement = self._idle.popitem()
            retirement.cancel()
            if connection.is_connected:
                return connection
        return None

    async def _connect(self) -> "_Connection":
        connection = _Connection(
            self._open,
            hostname=self._host,
            port=self._port,
            username=self._username,
            password=self._password,
            use_tls=self._security == "tls",
            start_tls=self._security == "starttls",
            tls_context=self._tls,
            local_hostname=self._local_hostname,
            timeout=self._timeout,
        )
        try:
            await connection.connect()
            if connection.is_ehlo_or_helo_needed:
                await connection.ehlo()
        except BaseException:
            connection.close()
            self._reachable = False
            raise
        self._reachable = True
        return connection

    @contextlib.asynccontextmanager
    async def _using(self, connection: "_Connection") -> AsyncIterator["_Connection"]:
        """Keep the connection warm afterwards, unless anything about its state is in doubt."""
        try:
            yield connection
        except SMTPResponseException:
            await connection.reset()
            raise
        except BaseException:
            connection.close()
            raise
        finally:
            self._keep(connection)

    def _keep(self, connection: "_Connection") -> None:
        if connection.is_connected:
            connection.is_warm = True
            self._idle[connection] = asyncio.create_task(self._retire(connection))

    async def _retire(self, connection: "_Connection") -> None:
        await asyncio.sleep(IDLE_SECONDS)
        async with self._slots:  # it counts until it is gone
            del self._idle[connection]
            await connection.leave()

    async def check(self) -> bool:
        """Tell, within 2 s, whether the server can be reached and greets us; known for 1 s.

        While every connection is in use, tells what the last attempt to connect found.
        """
        async with self._checking:
            if not self._slots.locked() and _now() >= self._check_again_at:
                self._reachable = await self._probe()
                self._check_again_at = _now() + CHECK_CACHE_SECONDS
            return self._reachable

    async def _probe(self) -> bool:
        try:
            async with (
                self._slots,
                asyncio.timeout(CHECK_SECONDS),
                self._using(self._take_idle() or await self._connect()) as connection,
            ):
                await connection.noop()
        except (OSError, SMTPException):
            return False
        return True

    @property
    def open_connections(self) -> int:
        """How many connections are being opened, used, kept warm or closed."""
        return len(self._open)

    async def close(self) -> None:
        """Take leave of the server, within 1 s; for when nothing is being sent any more."""
        leaving = []
        while connection := self._take_idle():
            leaving.append(connection.leave())
        await asyncio.gather(*leaving)


class _HungUpError(SMTPException):
    """The server had ended a warm connection before we said anything about this mail."""


class _Connection(SMTP):
    """One SMTP connection; closing it is immediate, so that a closed one never counts.

    aiosmtplib closes politely: it flushes what is left to write, and over TLS waits 30 s for the
    peer's goodbye, even when the peer is what we are giving up on.
    """

    def __init__(self, open_connections: "set[_Connection]", **settings: Any) -> None:
        super().__init__(**settings)
        self.is_warm = False
        self._open_connections = open_connections
        open_connections.add(self)

    async def begin(self, sender: str) -> None:
        """MAIL FROM. Raises _HungUpError where a fresh connection may be tried instead."""
        try:
            await self.mail(sender)
        except (SMTPServerDisconnected, SMTPSenderRefused) as error:
            # 421 is how a server says that it has had enough of this connection.
            if self.is_warm and not self.is_connected:
                raise _HungUpError("Connection lost") from error
            raise

    async def finish(self, content: bytes, *, dot_timeout: float) -> SMTPResponse:
        """DATA in its two steps; aiosmtplib has one timeout for both of their answers."""
        protocol = cast(SMTPProtocol, self.protocol)  # None only where DATA fails first
        go_ahead = await self.execute_command(b"DATA")
        if go_ahead.code != SMTPStatus.start_input:
            raise SMTPDataError(go_ahead.code, go_ahead.message)
        protocol.write(content)
        reply = await protocol.read_response(timeout=dot_timeout)
        if reply.code != SMTPStatus.completed:
            raise SMTPDataError(reply.code, reply.message)
        return reply

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
        if self.transport is not None:
            cast(asyncio.WriteTransport, self.transport).abort()
        super().close()
        self._open_connections.discard(self)


def _local_hostname() -> str:
    # Not socket.getfqdn, aiosmtplib's default: it asks the DNS, and may wait long for an answer.
    return re.sub(r"[^A-Za-z0-9.-]+", "-", socket.gethostname()).strip("-.") or "localhost"


def _on_the_wire(content: bytes) -> bytes:
    """Every line ends in CRLF and no line but the last is a dot (RFC 5321, 2.3.8 and 4.5.2)."""
    lines = re.sub(rb"\r\n|\r|\n", b"\r\n", content).removesuffix(b"\r\n") + b"\r\n"
    return re.sub(rb"(?m)^\.", b"..", lines) + b".\r\n"


def _now() -> float:
    return asyncio.get_running_loop().time()
