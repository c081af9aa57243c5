"""An SMTP server for development. It accepts every mail, delivers none, and keeps the newest."""

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
MAX_RECIPIENTS = 100  # of one mail; every server must accept 100 (RFC 5321, 4.5.3.1.8)

log = structlog.get_logger(__name__)


class Catcher:
    """An SMTP server in the running event loop. It writes each mail to a file in `directory`.

    The catcher keeps the newest `keep` mails, also across restarts. Only the user of this process
    can read them. A power cut may lose the newest mails, but never leaves a part of one.
    """

    def __init__(self, host: str, port: int, directory: Path, keep: int = 1000) -> None:
        self._host = host
        self._port = port
        self._directory = directory
        self._keep = keep
        self._ids: deque[str] = deque()  # of the mails in the directory, oldest first
        self._sessions: weakref.WeakSet[SMTP] = weakref.WeakSet()
        self._servers: list[asyncio.Server] = []  # one per address of the host

    async def start(self) -> None:
        """Remove half-written files, and listen on all addresses that `host` stands for.

        Raises CannotListen, or OSError if the directory cannot be used.
        """
        self._make_directory()
        for half_written in self._directory.glob("*.tmp"):
            half_written.unlink()
        self._ids = deque(self._stored_ids())
        loop = asyncio.get_running_loop()
        self._servers = [
            await loop.create_server(self._new_session, sock=opened)
            for opened in bind(self._host, self._port, prefix="SMTP_")
        ]

    @property
    def port(self) -> int:
        """The port of the server. If it was given as 0, the system chose one at `start`."""
        if not self._servers:
            return self._port
        port: int = self._servers[0].sockets[0].getsockname()[1]
        return port

    async def stop(self) -> None:
        """Stop listening, and close every connection. Does nothing if it was not started."""
        for server in self._servers:
            server.close()
        # Closing a server leaves its connections open, and wait_closed would wait for them.
        for session in self._sessions:
            if session.transport is not None:
                cast(asyncio.Transport, session.transport).abort()
        for server in self._servers:
            await server.wait_closed()
        self._servers = []

    def _new_session(self) -> SMTP:
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
        """Accept a recipient, unless there are too many. Returns the SMTP reply."""
        if len(envelope.rcpt_tos) == MAX_RECIPIENTS:
            return "452 4.5.3 Too many recipients"
        envelope.rcpt_tos.append(address)
        envelope.rcpt_options.extend(options)
        return "250 2.1.5 OK"

    async def handle_DATA(  # noqa: N802 -- aiosmtpd calls it by this name
        self, _server: SMTP, _session: Session, envelope: Envelope
    ) -> str:
        """Write one mail to its file, and only then return the SMTP reply that accepts it."""
        try:
            caught_id = await asyncio.to_thread(self._store, envelope)
        except OSError as error:
            log.error("mail not caught", directory=str(self._directory), error=str(error))  # noqa: TRY400
            return "452 4.3.1 The mail could not be stored"
        return f"250 2.0.0 Caught as {caught_id}"

    def _store(self, envelope: Envelope) -> str:
        """Write a mail to a file, and return its id. Raises OSError, and then leaves no file."""
        caught_id = f"{time.time_ns():019}-{secrets.token_hex(4)}"
        content = envelope.original_content or b""
        first_line = caught.first_line(envelope.mail_from, envelope.rcpt_tos, content)
        self._make_directory()  # a user may have removed it while the service runs
        # The file gets its final name once it is complete and synced. So a crash or a power cut
        # leaves only whole mails.
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
        self._remove_the_oldest()
        return caught_id

    def _remove_the_oldest(self) -> None:
        while len(self._ids) > self._keep:
            with contextlib.suppress(OSError):  # the new mail is stored already
                self._path(self._ids.popleft()).unlink()

    def _make_directory(self) -> None:
        self._directory.parent.mkdir(parents=True, exist_ok=True)
        self._directory.mkdir(mode=0o700, exist_ok=True)

    def list(self, limit: int = 100) -> Sequence[Summary]:
        """Return up to `limit` mails, newest first. A broken mail is in the list, too.

        Reads the head of each file, so call it in a thread.
        """
        summaries = map(self._summary, reversed(self._stored_ids()[-limit:]))
        return [summary for summary in summaries if summary is not None]

    def get(self, caught_id: str) -> Caught | None:
        """Return one mail, or None if it does not exist or was removed.

        Reads at most MOST_SHOWN bytes of the mail, so call it in a thread.
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
        except FileNotFoundError:  # removed since the ids were read
            return None

    def _stored_ids(self) -> Sequence[str]:
        """Return the ids of the mails, oldest first."""
        try:
            names = [path.stem for path in self._directory.iterdir() if path.suffix == ".eml"]
        except FileNotFoundError:  # a user removed the directory
            return []
        return sorted(filter(_ID.fullmatch, names))

    def _path(self, caught_id: str) -> Path:
        return self._directory / f"{caught_id}.eml"


_ID = re.compile(r"[0-9]{19}-[0-9a-f]{8}")  # nanoseconds and chance; ids sort by time


def _open_private(path: str, flags: int) -> int:
    return os.open(path, flags, mode=0o600)
