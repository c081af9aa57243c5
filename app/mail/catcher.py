"""An SMTP server for development. It accepts mail, delivers none, and keeps the newest.

`app.mail.fault_addresses` has the addresses for which it fails on purpose.
"""

import asyncio
import contextlib
import os
import re
import secrets
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TypeVar, cast

import structlog
from aiosmtpd.smtp import SMTP, Envelope, Session

from app.listening import bind
from app.mail import caught, fault_addresses
from app.mail.caught import Attachment, Caught, Summary

MAX_MESSAGE_BYTES = 32 * 1024 * 1024
MAX_RECIPIENTS = 100  # of one mail; every server must accept 100 (RFC 5321, 4.5.3.1.8)

ResultT = TypeVar("ResultT")

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
        self._deferrals = fault_addresses.Deferrals()

    async def start(self) -> None:
        """Remove half-written mails, and listen on all addresses that `host` stands for.

        Raises CannotListen, or OSError if the directory cannot be used.
        """
        self._make_directory()
        for half_written in self._directory.glob("*.tmp"):
            if _ID.fullmatch(half_written.stem):  # else another program wrote it
                half_written.unlink(missing_ok=True)
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
        """Accept a recipient, unless there are too many or the address asks for a refusal.

        Returns the SMTP reply.
        """
        if refusal := fault_addresses.refusal(address):
            return refusal
        if len(envelope.rcpt_tos) == MAX_RECIPIENTS:
            return "452 4.5.3 Too many recipients"
        envelope.rcpt_tos.append(address)
        envelope.rcpt_options.extend(options)
        return "250 2.1.5 OK"

    async def handle_DATA(  # noqa: N802 -- aiosmtpd calls it by this name
        self, _server: SMTP, _session: Session, envelope: Envelope
    ) -> str:
        """Write one mail to its file, and only then return the SMTP reply that accepts it."""
        recipients, content = envelope.rcpt_tos, envelope.original_content or b""
        if delay := fault_addresses.delay(recipients):
            await asyncio.sleep(delay)
        if deferral := self._deferrals.deferral(recipients, content):
            return deferral
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

    def list(
        self, words: Sequence[str] = (), *, after: str | None = None, limit: int = 100
    ) -> Sequence[Summary]:
        """Return up to `limit` mails, newest first. A broken mail is in the list, too.

        A mail is listed if each word is in its sender, a recipient or its subject. With `after`,
        the id of a mail, only older mails are listed. The heads are read one by one, and only the
        listed mails are kept in memory. Call it in a thread: with words, it may read every file.
        """
        found = (mail for mail in self._summaries(after) if mail.has_words(words))
        return list(islice(found, limit))

    def count(self) -> int:
        """Return the number of mails."""
        return len(self._stored_ids())

    def find(self, message_id: str) -> str | None:
        """Return the id of the newest mail with this Message-ID, or None.

        The Message-ID may be given with or without its angle brackets. Like `list`, call it in a
        thread.
        """
        if not (wanted := message_id.strip("<>")):
            return None
        known = ((mail.id, mail.message_id or "") for mail in self._summaries())
        return next((caught_id for caught_id, name in known if name.strip("<>") == wanted), None)

    def get(self, caught_id: str) -> Caught | None:
        """Return one mail, or None if it does not exist or was removed.

        Reads the file once, but keeps only the texts, so call it in a thread.
        """
        return self._if_stored(caught.read, caught_id)

    def read_source(self, caught_id: str) -> Iterator[bytes]:
        """Read the mail as the client sent it, in blocks.

        The first block raises FileNotFoundError if the mail was removed. The id must be one that
        this catcher gave.
        """
        return caught.read_source(self._path(caught_id))

    def read_attachment(self, caught_id: str, attachment: Attachment) -> Iterator[bytes]:
        """Read an attachment in blocks, like `read_source`."""
        return caught.read_attachment(self._path(caught_id), attachment)

    def delete(self, caught_id: str) -> bool:
        """Remove a mail, and return whether there was one. Raises OSError. Call it in a thread."""
        return bool(self._if_stored(self._remove, caught_id))

    def delete_all(self, up_to: str | None = None) -> None:
        """Remove all mails; with `up_to`, the id of a mail, only this one and older ones.

        Raises OSError for a file that cannot be removed. Call it in a thread.
        """
        for caught_id in self._stored_ids():
            if up_to is None or caught_id <= up_to:
                self.delete(caught_id)

    def _remove(self, path: Path) -> bool:
        path.unlink()
        with contextlib.suppress(ValueError):  # another program wrote the file
            self._ids.remove(path.stem)
        return True

    def _summaries(self, after: str | None = None) -> Iterator[Summary]:
        """Read the head of each mail, newest first; with `after`, only of older mails."""
        for caught_id in reversed(self._stored_ids()):
            if after is None or caught_id < after:
                summary = self._if_stored(caught.summarise, caught_id)
                if summary is not None:  # else it was removed since the ids were read
                    yield summary

    def _if_stored(self, read: Callable[[Path], ResultT], caught_id: str) -> ResultT | None:
        """Call a function with the path of a mail. Returns None if the mail does not exist."""
        if not _ID.fullmatch(caught_id):
            return None
        try:
            return read(self._path(caught_id))
        except FileNotFoundError:
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
