"""Send mails to the SMTP server over a pool of connections, whose number is limited."""

import asyncio
import errno
import socket
import ssl
from collections.abc import Awaitable, Callable
from email.message import EmailMessage
from typing import Literal

from aiosmtplib import SMTPException, SMTPResponse, SMTPResponseException, SMTPServerDisconnected

from app.mail.connection import Connection, UnexpectedReply, is_qualified
from app.mail.message import address
from app.mail.replies import (
    MailDeferred,
    MailError,
    MailRefused,
    ServerUnavailable,
    classify,
    describe,
    one_line,
)

Security = Literal["none", "starttls", "tls"]

# An idle connection is closed after this time. A server waits 300 s (RFC 5321, 4.5.3.2.7).
IDLE_SECONDS = 30.0
CHECK_SECONDS = 2.0  # the longest time that a check takes
CHECK_CACHE_SECONDS = 1.0  # the result of a check is used again for so long

_NO_DESCRIPTORS = {errno.EMFILE, errno.ENFILE}


class Mailer:
    """Sends mails to one SMTP server, over a pool of at most `connections` connections.

    A connection stays open for 30 s after its last use by a mail or a check, so polling /readyz
    keeps one open. With `security="starttls"` no mail is sent without STARTTLS. Certificates are
    checked against the system's authorities; the environment variable SSL_CERT_FILE names others.

    Args:
        timeout: seconds for each step: to connect, to begin TLS, for the reply to a command.
        data_timeout: seconds for the reply to the final dot. Giving up too early makes duplicates,
            because the server may have taken the mail (RFC 5321, 4.5.3.2.6; RFC 1047).
        local_hostname: the name for EHLO. None means this machine's name, or its IP address if the
            name is not fully qualified.
    """

    def __init__(  # noqa: PLR0913 -- every argument is given by name
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
        local_hostname: str | None = None,
    ) -> None:
        self._host = host
        self._port = port
        self._login = None if username is None else (username, password or "")
        self._security = security
        self._tls = None if security == "none" else ssl.create_default_context()
        self._local_hostname = local_hostname or _name_of_this_machine()
        self._timeout = timeout
        self._data_timeout = data_timeout

        # A connection that is being opened, used or closed has a slot. An idle one has none, but a
        # mail opens a new connection only if none is idle, so there are never more than slots.
        # `_open` has every connection until it is closed. `_idle` has each idle connection with the
        # time at which it became idle. The connection that has been idle longest comes first.
        self._slots = asyncio.Semaphore(connections)
        self._open: set[Connection] = set()
        self._idle: dict[Connection, float] = {}
        self._idle_closer: asyncio.Task[None] | None = None
        self._reachable = False
        self._checking = asyncio.Lock()
        self._check_again_at = 0.0

    async def send(self, message: EmailMessage, *, sender: str, recipient: str) -> str:
        """Send one mail to one recipient, and return the server's reply, such as `250 2.0.0 Ok`.

        Waits for a free connection. Raises:

        - MailRefused if the server, or a rule of ours, will never take this mail.
        - MailDeferred if the server may take it later. It may have taken it already, if its reply
          to the final dot was lost.
        - ServerUnavailable, a MailDeferred, if no mail at all can be sent now.
        """
        # 1. Check both addresses: one with a line break in it could add commands of its own.
        try:
            content = _as_smtp_data(message.as_bytes())
            sender, recipient = address(sender), address(recipient)
        except ValueError as error:  # the same mail would fail again
            raise MailRefused("The mail cannot be put on the wire") from error
        # 2. Wait for a slot, and send the mail.
        try:
            async with self._slots:
                reply = await self._exchange(lambda server: server.send(content, sender, recipient))
        except (OSError, SMTPException) as error:
            raise classify(error) from error
        return one_line(str(reply))

    async def _exchange(
        self, commands: Callable[[Connection], Awaitable[SMTPResponse]]
    ) -> SMTPResponse:
        """Run some commands over an idle connection, or over a new one. The caller has a slot.

        For example, the server was restarted while connection A was idle. The mail is sent over A,
        which turns out to be closed before the server has replied to MAIL. So the server cannot
        have taken the mail, and it is sent again over a new connection B, within the same attempt.
        """
        # 1. Prefer an idle connection.
        if idle := self._take_idle():
            try:
                return await self._run(idle, commands(idle))
            except (SMTPServerDisconnected, UnexpectedReply):
                # The mail or the check fails if the server has replied to one of its commands. It
                # goes on to step 2 if the connection was lost before, or the first reply was a 421.
                if idle.has_answered:
                    raise
        # 2. Open a new connection.
        fresh = await self._connect()
        return await self._run(fresh, commands(fresh))

    async def _run(self, connection: Connection, exchange: Awaitable[SMTPResponse]) -> SMTPResponse:
        """Run an exchange, then put the connection back into the pool, or close it.

        After a refusal the connection is reset and kept. After any other error, such as a time-out
        or a cancellation, its state is not known, and it is closed.
        """
        try:
            return await exchange
        except SMTPResponseException:
            await connection.reset()
            raise
        except BaseException:
            connection.close()
            raise
        finally:
            self._put_back(connection)

    def _take_idle(self) -> Connection | None:
        """Take the connection that was used last, so that under light load the others close."""
        while self._idle:
            connection, _ = self._idle.popitem()
            if connection.is_connected:
                connection.has_answered = False
                return connection
        return None

    async def _connect(self) -> Connection:
        connection = Connection(
            self._open,
            host=self._host,
            port=self._port,
            login=self._login,
            tls=self._tls,
            starttls=self._security == "starttls",
            local_hostname=self._local_hostname,
            timeout=self._timeout,
            data_timeout=self._data_timeout,
        )
        try:
            await connection.open()
        # A name that has no form for the DNS raises UnicodeError, a ValueError.
        except (OSError, SMTPException, ValueError) as error:
            raise self._connection_error(error) from error
        finally:
            self._reachable = connection.is_ready
            if not connection.is_ready:
                connection.close()
        return connection

    def _connection_error(self, error: Exception) -> MailDeferred:
        """Return ServerUnavailable for an outage, MailDeferred for one connection too many.

        A limit is reached if the server refuses this connection with a reply, or the process has no
        free file descriptor, while other connections are ready. Mails go on over those, so the
        server is not down. For example, with 10 connections allowed here and 5 by the server, the
        sixth gets `421 Too many connections`, and only the mail that asked for it is deferred.
        """
        detail, code = describe(error)
        if not isinstance(error, SMTPException | TimeoutError):
            detail = f"No connection to the SMTP server {self._host}:{self._port}: {detail}"
        is_limit = isinstance(error, SMTPResponseException) or (
            isinstance(error, OSError) and error.errno in _NO_DESCRIPTORS
        )
        if is_limit and any(other.is_ready for other in self._open):
            return MailDeferred(detail, code)
        return ServerUnavailable(detail, code)

    def _put_back(self, connection: Connection) -> None:
        """Make a connection idle if it is still open, and see that it is closed in the end."""
        if connection.is_connected:
            self._idle[connection] = _now()
            if self._idle_closer is None or self._idle_closer.done():
                self._idle_closer = asyncio.create_task(self._close_idle())

    async def _close_idle(self) -> None:
        """Close each connection that has been idle for IDLE_SECONDS, until none is idle."""
        while self._idle:
            # 1. Wait for the connection that has been idle longest.
            connection, since = next(iter(self._idle.items()))
            if (left := since + IDLE_SECONDS - _now()) > 0:
                await asyncio.sleep(left)
                continue
            # 2. Close it, with a slot, because it counts as open until the server has replied to
            # QUIT. A mail may have used it while this task waited for the slot.
            async with self._slots:
                if self._idle.get(connection) == since:
                    del self._idle[connection]
                    await connection.quit_and_close()

    async def check(self) -> bool:
        """Return whether the server can be reached and replies. Takes at most 2 s.

        The result is cached for 1 s. While every connection is in use, returns the cached result,
        or that of the last attempt to connect.
        """
        async with self._checking:
            if not self._slots.locked() and _now() >= self._check_again_at:
                self._reachable = await self._probe()
                self._check_again_at = _now() + CHECK_CACHE_SECONDS
            return self._reachable

    async def _probe(self) -> bool:
        try:
            async with self._slots, asyncio.timeout(CHECK_SECONDS):
                await self._exchange(lambda server: server.check())
        except (OSError, SMTPException, MailError):
            return False
        return True

    @property
    def open_connections(self) -> int:
        """The number of connections that are being opened, used or closed, or are idle."""
        return len(self._open)

    async def close(self) -> None:
        """Close all idle connections, within 1 s. Call it when no mail is being sent any more."""
        if self._idle_closer is not None:
            self._idle_closer.cancel()
        goodbyes = []
        while connection := self._take_idle():
            goodbyes.append(connection.quit_and_close())
        await asyncio.gather(*goodbyes)


def _name_of_this_machine() -> str | None:
    # aiosmtplib's default is socket.getfqdn, which asks the DNS and may wait long for its answer.
    name = socket.gethostname()
    return name if is_qualified(name) else None


def _as_smtp_data(content: bytes) -> bytes:
    r"""Return a mail as it follows DATA (RFC 5321, 2.3.8 and 4.5.2).

    Every line ends in CRLF, a dot at the start of a line is doubled, and a line with a single dot
    ends the mail: b"a\n.b" becomes b"a\r\n..b\r\n.\r\n".
    """
    lines = b"\r\n".join([b"", *content.splitlines()])  # bytes split at CR, LF and CRLF only
    return lines.replace(b"\r\n.", b"\r\n..").removeprefix(b"\r\n") + b"\r\n.\r\n"


def _now() -> float:
    return asyncio.get_running_loop().time()
