"""Hand mails to the SMTP server over a few warm connections, never more than so many at once."""

import asyncio
import errno
import socket
import ssl
from collections.abc import Awaitable, Callable
from email.message import EmailMessage
from typing import Literal

from aiosmtplib import SMTPException, SMTPResponse, SMTPResponseException, SMTPServerDisconnected

from app.mail.connection import Connection, NotTaken, is_qualified
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

IDLE_SECONDS = 30.0  # well below the 300 after which servers hang up (RFC 5321, 4.5.3.2.7)
CHECK_SECONDS = 2.0
CHECK_CACHE_SECONDS = 1.0

_NO_DESCRIPTORS = {errno.EMFILE, errno.ENFILE}


class Mailer:
    """The way to one SMTP server: at most `connections` open at once, kept warm between mails.

    `timeout` is in seconds, for each step (connecting, TLS, each command's answer); `data_timeout`
    for the answer to the final dot, where haste makes duplicates (RFC 5321, 4.5.3.2.6; RFC 1047).
    `starttls` insists on STARTTLS. Certificates are checked against the system's authorities
    (`SSL_CERT_FILE` names others). `local_hostname` is the name for EHLO: this machine's if None,
    or its address where that name is not fully qualified.
    """

    def __init__(  # noqa: PLR0913 -- settings, each of which is named where it is given
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

        self._slots = asyncio.Semaphore(connections)  # whoever uses or opens a connection has one
        self._open: set[Connection] = set()
        self._idle: dict[Connection, float] = {}  # since when, the longest first
        self._retiring: asyncio.Task[None] | None = None
        self._reachable = False
        self._checking = asyncio.Lock()
        self._check_again_at = 0.0

    async def send(self, message: EmailMessage, *, sender: str, recipient: str) -> str:
        """Send one mail to one recipient; return the server's last reply, such as `250 2.0.0 Ok`.

        Waits for a free connection. Raises MailRefused, MailDeferred, or ServerUnavailable where
        any mail would have been deferred. The server may have taken the mail even so, if its answer
        to the final dot was lost.
        """
        try:
            content = _on_the_wire(message.as_bytes())
            # Before anything is said: what `address` gives is fit for a command line.
            sender, recipient = address(sender), address(recipient)
        except ValueError as error:  # waiting will not make it fit
            raise MailRefused("The mail cannot be put on the wire") from error
        try:
            async with self._slots:
                reply = await self._exchange(lambda server: server.send(content, sender, recipient))
        except (OSError, SMTPException) as error:
            raise classify(error) from error
        return one_line(str(reply))

    async def _exchange(
        self, words: Callable[[Connection], Awaitable[SMTPResponse]]
    ) -> SMTPResponse:
        """Exchange some words with the server, over a warm connection if there is one."""
        if warm := self._take_idle():
            try:
                return await self._use(warm, words(warm))
            except (SMTPServerDisconnected, NotTaken):
                # Ended before a word about this mail, or with 421: enough of this connection.
                if warm.has_answered:
                    raise
        fresh = await self._connect()
        return await self._use(fresh, words(fresh))

    async def _use(self, connection: Connection, exchange: Awaitable[SMTPResponse]) -> SMTPResponse:
        """Keep the connection warm afterwards, unless anything about its state is in doubt."""
        try:
            return await exchange
        except SMTPResponseException:
            await connection.reset()
            raise
        except BaseException:
            connection.close()
            raise
        finally:
            self._keep(connection)

    def _take_idle(self) -> Connection | None:
        while self._idle:
            # The newest: under light load the others are left to retire.
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
        # UnicodeError, a ValueError, is how a name that cannot be looked up shows.
        except (OSError, SMTPException, ValueError) as error:
            raise self._not_connected(error) from error
        finally:
            self._reachable = connection.is_ready
            if not connection.is_ready:
                connection.close()
        return connection

    def _not_connected(self, error: Exception) -> MailDeferred:
        """Tell an outage, which is the same for every mail, from one connection too many.

        A server that answers, and serves other connections of ours, has reached its limit; so has
        this process without free file descriptors. Mail goes on over the connections there are.
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

    def _keep(self, connection: Connection) -> None:
        if connection.is_connected:
            self._idle[connection] = _now()
            if self._retiring is None or self._retiring.done():
                self._retiring = asyncio.create_task(self._retire())

    async def _retire(self) -> None:
        """Take leave of what has been idle for long, until nothing is idle any more."""
        while self._idle:
            connection, since = next(iter(self._idle.items()))
            if (left := since + IDLE_SECONDS - _now()) > 0:
                await asyncio.sleep(left)
                continue
            async with self._slots:  # it counts until it is gone
                if self._idle.get(connection) == since:
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
            async with self._slots, asyncio.timeout(CHECK_SECONDS):
                await self._exchange(lambda server: server.noop())
        except (OSError, SMTPException, MailError):
            return False
        return True

    @property
    def open_connections(self) -> int:
        """How many connections are being opened, used, kept warm or closed."""
        return len(self._open)

    async def close(self) -> None:
        """Take leave of the server, within 1 s; for when nothing is being sent any more."""
        if self._retiring is not None:
            self._retiring.cancel()
        leaving = []
        while connection := self._take_idle():
            leaving.append(connection.leave())
        await asyncio.gather(*leaving)


def _name_of_this_machine() -> str | None:
    # Not socket.getfqdn, aiosmtplib's default: it asks the DNS, and may wait long for an answer.
    name = socket.gethostname()
    return name if is_qualified(name) else None


def _on_the_wire(content: bytes) -> bytes:
    """Every line ends in CRLF and no line but the last is a dot (RFC 5321, 2.3.8 and 4.5.2)."""
    lines = b"\r\n".join([b"", *content.splitlines()])  # of bytes: at CR, LF and CRLF alone
    return lines.replace(b"\r\n.", b"\r\n..").removeprefix(b"\r\n") + b"\r\n.\r\n"


def _now() -> float:
    return asyncio.get_running_loop().time()
