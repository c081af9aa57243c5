"""A small SMTP server for development: it takes every mail, delivers none, and shows them all."""

import asyncio
import contextlib
import os
import re
import secrets
import time
import weakref
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import structlog
from aiosmtpd.smtp import SMTP, Envelope, Session

from app.listening import bind
from app.mail import caught
from app.mail.caught import Caught, Summary

MAX_MESSAGE_BYTES = 32 * 1024 * 1024
MAX_RECIPIENTS = 100  # of one mail; a server takes so many at least (RFC 5321, 4.5.3.1.8)

log = structlog.get_logger(__name__)


class Catcher:
    """An SMTP server in the running event loop; each mail is a file in `directory`.

    The newest `keep` mails stay, whatever process wrote them; a restart finds them again. Only the
    user that runs the service can read them. A power cut may take the newest mails, but never
    leaves a part of one.
    """

    def __init__(self, host: str, port: int, directory: Path, keep: int = 1000) -> None:
        self._host = host
        self._port = port
        self._directory = directory
        self._keep = keep
        self._ids: deque[str] = deque()  # what the directory holds, oldest first
        self._sessions: weakref.WeakSet[SMTP] = weakref.WeakSet()
        self._servers: list[asyncio.Server] = []  # one for each address of the host

    async def start(self) -> None:
        """Listen on every address of the host that this machine has.

        Raises CannotListen, and OSError for a directory that cannot be used.
        """
        self._make_directory()
        for half_written in self._directory.glob("*.tmp"):
            half_written.unlink()
        self._ids = deque(self._stored())
        loop = asyncio.get_running_loop()
        self._servers = [
            await loop.create_server(self._session, sock=opened)
            for opened in bind(self._host, self._port, prefix="SMTP_")
        ]

    @property
    def port(self) -> int:
        """The port it listens on; the system's choice if it was made with 0."""
        if not self._servers:
            return self._port
        port: int = self._servers[0].sockets[0].getsockname()[1]
        return port

    async def stop(self) -> None:
        """Stop listening and end every connection; does nothing if it was not started."""
        for server in self._servers:
            server.close()
        for session in self._sessions:
            if session.transport is not None:
                cast(asyncio.Transport, session.transport).abort()
        for server in self._servers:
            await server.wait_closed()
        self._servers = []

    def _session(self) -> SMTP:
        session = SMTP(
            self,
            data_size_limit=MAX_MESSAGE_BYTES,
            enable_SMTPUTF8=True,
            hostname="localhost",
            ident="Mail catcher",
            loop=asyncio.get_running_loop(),
        )
        self._sessions.add(session)
        return session

    async def handle_RCPT(  # noqa: N802 -- aiosmtpd calls it by this name
        self,
        _server: SMTP,
        _session: Session,
        envelope: Envelope,
        address: str,
        options: Sequence[str],
    ) -> str:
        """Take a recipient, unless there are too many; answer with an SMTP reply."""
        if len(envelope.rcpt_tos) == MAX_RECIPIENTS:
            return "452 4.5.3 Too many recipients"
        envelope.rcpt_tos.append(address)
        envelope.rcpt_options.extend(options)
        return "250 2.1.5 OK"

    async def handle_DATA(  # noqa: N802 -- aiosmtpd calls it by this name
        self, _server: SMTP, _session: Session, envelope: Envelope
    ) -> str:
        """Store one mail before it is acknowledged; answer with an SMTP reply."""
        try:
            caught_id = await asyncio.to_thread(self._store, envelope)
        except OSError as error:
            log.error("mail not caught", directory=str(self._directory), error=str(error))  # noqa: TRY400
            return "452 4.3.1 The mail could not be stored"
        return f"250 2.0.0 Caught as {caught_id}"

    def _store(self, envelope: Envelope) -> str:
        """Write a mail to its file. Raises OSError, and then leaves nothing of it."""
        caught_id = f"{time.time_ns():019}-{secrets.token_hex(4)}"
        content = envelope.original_content or b""
        first_line = caught.first_line(envelope.mail_from, envelope.rcpt_tos, content)
        self._make_directory()  # it may have been removed while the service runs
        # A kill or a power cut leaves whole mails only, because a file that is renamed is complete.
        half_written = self._directory / f"{caught_id}.tmp"
        try:
            with open(half_written, "xb", opener=_open_private) as file:
                file.writelines((first_line, content))
                file.flush()
                os.fsync(file.fileno())
            half_written.rename(self._path(caught_id))
        except OSError:
            half_written.unlink(missing_ok=True)
            raise
        self._ids.append(caught_id)
        self._forget_the_oldest()
        return caught_id

    def _forget_the_oldest(self) -> None:
        while len(self._ids) > self._keep:
            with contextlib.suppress(OSError):  # the new mail is stored all the same
                self._path(self._ids.popleft()).unlink()

    def _make_directory(self) -> None:
        self._directory.parent.mkdir(parents=True, exist_ok=True)
        self._directory.mkdir(mode=0o700, exist_ok=True)

    def list(self, limit: int = 100) -> Sequence[Summary]:
        """Return the newest mails, newest first, as far as they can be read.

        Reads the head of each file: call it in a thread.
        """
        summaries = map(self._summary, reversed(self._stored()[-limit:]))
        return [summary for summary in summaries if summary is not None]

    def get(self, caught_id: str) -> Caught | None:
        """Return one mail, or None if there is none (any longer).

        Reads at most MOST_SHOWN bytes of the mail: call it in a thread.
        """
        if not _ID.fullmatch(caught_id):
            return None
        try:
            return caught.read(self._path(caught_id))
        except FileNotFoundError:
            return None

    def _summary(self, caught_id: str) -> Summary | None:
        try:
            return caught.summarise(self._path(caught_id))
        except FileNotFoundError:  # removed meanwhile
            return None

    def _stored(self) -> Sequence[str]:
        """Return the ids of the mails, oldest first."""
        try:
            names = [path.stem for path in self._directory.iterdir() if path.suffix == ".eml"]
        except FileNotFoundError:  # removed while the service runs
            return []
        return sorted(filter(_ID.fullmatch, names))

    def _path(self, caught_id: str) -> Path:
        return self._directory / f"{caught_id}.eml"


_ID = re.compile(r"[0-9]{19}-[0-9a-f]{8}")  # nanoseconds, so names sort by time


def _open_private(path: str, flags: int) -> int:
    return os.open(path, flags, mode=0o600)
