"""A small SMTP server for development: it takes every mail, delivers none, and shows them all."""

import asyncio
import json
import re
import secrets
import time
import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email import message_from_bytes
from email.message import EmailMessage
from email.policy import default
from pathlib import Path
from typing import cast

from aiosmtpd.smtp import SMTP, Envelope, Session

MAX_MESSAGE_BYTES = 32 * 1024 * 1024


@dataclass(frozen=True)
class Caught:
    """One mail that was caught: its envelope, what it says, and its bytes as they came."""

    id: str
    received_at: datetime
    sender: str
    recipients: tuple[str, ...]
    message_id: str | None
    subject: str
    text: str | None
    html: str | None
    headers: tuple[tuple[str, str], ...]
    raw: bytes


class Catcher:
    """An SMTP server in the running event loop; each mail is a file in `directory`.

    The newest `keep` mails stay, whatever process wrote them; a restart finds them again.
    """

    def __init__(self, host: str, port: int, directory: Path, keep: int = 1000) -> None:
        self._host = host
        self._port = port
        self._directory = directory
        self._keep = keep
        self._ids: deque[str] = deque()  # what the directory holds, oldest first
        self._sessions: weakref.WeakSet[SMTP] = weakref.WeakSet()
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        """Listen. Raises OSError, saying where, when the port is taken or may not be used."""
        self._directory.mkdir(parents=True, exist_ok=True)
        for half_written in self._directory.glob("*.tmp"):
            half_written.unlink()
        self._ids = deque(self._stored())
        try:
            self._server = await asyncio.get_running_loop().create_server(
                self._session, self._host, self._port
            )
        except OSError as error:
            where = f"{self._host}:{self._port}"
            raise OSError(error.errno, f"The mail catcher cannot listen on {where}") from error

    @property
    def port(self) -> int:
        """The port it listens on; the system's choice if it was made with 0."""
        if self._server is None:
            return self._port
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    async def stop(self) -> None:
        """Stop listening and end every connection; does nothing if it was not started."""
        if self._server is None:
            return
        self._server.close()
        for session in self._sessions:
            if session.transport is not None:
                cast(asyncio.Transport, session.transport).abort()
        await self._server.wait_closed()
        self._server = None

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

    async def handle_DATA(  # noqa: N802 -- aiosmtpd calls it by this name
        self, _server: SMTP, _session: Session, envelope: Envelope
    ) -> str:
        """Store one mail before it is acknowledged; answer with an SMTP reply."""
        try:
            caught_id = await asyncio.to_thread(self._store, envelope)
        except OSError:
            return "452 4.3.1 The mail could not be stored"
        return f"250 2.0.0 Caught as {caught_id}"

    def _store(self, envelope: Envelope) -> str:
        caught_id = f"{time.time_ns():019}-{secrets.token_hex(4)}"
        record = json.dumps({"sender": envelope.mail_from, "recipients": envelope.rcpt_tos})
        content = envelope.original_content or b""
        # A kill -9 leaves whole mails only: one that is renamed is complete.
        half_written = self._directory / f"{caught_id}.tmp"
        half_written.write_bytes(b"".join([_ENVELOPE, record.encode(), b"\r\n", content]))
        half_written.rename(self._path(caught_id))
        self._ids.append(caught_id)
        while len(self._ids) > self._keep:
            self._path(self._ids.popleft()).unlink(missing_ok=True)
        return caught_id

    def list(self, limit: int = 100) -> Sequence[Caught]:
        """Return the newest mails, newest first. Reads files: call it in a thread."""
        newest = reversed(self._stored()[-limit:])
        return [caught for caught in map(self.get, newest) if caught is not None]

    def get(self, caught_id: str) -> Caught | None:
        """Return one mail, or None if there is none (any longer). Reads a file."""
        if not _ID.fullmatch(caught_id):
            return None
        try:
            return _parse(caught_id, self._path(caught_id).read_bytes())
        except FileNotFoundError:
            return None

    def _stored(self) -> Sequence[str]:
        return sorted(path.stem for path in self._directory.glob("*.eml") if _ID.match(path.stem))

    def _path(self, caught_id: str) -> Path:
        return self._directory / f"{caught_id}.eml"


_ID = re.compile(r"[0-9]{19}-[0-9a-f]{8}")  # nanoseconds, so names sort by time
_ENVELOPE = b"X-Envelope: "  # the file's first line; the mail as it came is the rest


def _parse(caught_id: str, stored: bytes) -> Caught:
    envelope, _, raw = stored.partition(b"\r\n")
    record = json.loads(envelope.removeprefix(_ENVELOPE))
    message = message_from_bytes(raw, policy=default)
    return Caught(
        id=caught_id,
        received_at=datetime.fromtimestamp(int(caught_id[:19]) / 1e9, UTC),
        sender=record["sender"],
        recipients=tuple(record["recipients"]),
        message_id=message.get("Message-ID"),
        subject=message["Subject"] or "",
        text=_body(message, "plain"),
        html=_body(message, "html"),
        headers=tuple((name, str(value)) for name, value in message.items()),
        raw=raw,
    )


def _body(message: EmailMessage, kind: str) -> str | None:
    part = message.get_body((kind,))
    if part is None:
        return None
    # Not get_content: any client may send here, and a charset nobody knows would raise.
    content = cast(bytes, part.get_payload(decode=True))
    charset = part.get_content_charset("utf-8")
    try:
        return content.decode(charset, "replace").replace("\r\n", "\n")
    except LookupError:
        return content.decode("latin-1").replace("\r\n", "\n")
