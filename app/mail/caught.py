"""The file format of caught mails. A broken mail is read as far as possible.

The first line is the envelope as JSON, and the rest is the mail as the client sent it:

    X-Envelope: {"sender": "a@example.com", "recipients": ["b@example.org"], "attachments": 0}
    From: a@example.com
    ...

A client may send any bytes, so no code here relies on a valid mail. Reading is bounded in memory
and in time.
"""

import codecs
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from app.mail.fields import MOST_HEAD, decoded_field, fields, first_field, without_surrogates
from app.mail.parts import MOST_PARTS, Part, decoded, find_parts, read_blocks

MOST_SHOWN = 2 * 1024 * 1024  # bytes of a text that are read to show it
_MOST_ENVELOPE = 128 * 1024  # bytes of the first line

_ENVELOPE = b"X-Envelope: "
# The first two take time that grows with the square of the length. The others emit warnings for
# invalid escapes.
_UNSUITABLE_CODECS = {"punycode", "idna", "unicode-escape", "raw-unicode-escape"}

ResultT = TypeVar("ResultT")


@dataclass(frozen=True, kw_only=True)
class Summary:
    """A mail in a list. `size` is in bytes. `attachments` is None if the number is not known."""

    id: str
    received_at: datetime
    sender: str
    recipients: tuple[str, ...]
    subject: str
    message_id: str | None
    size: int
    attachments: int | None

    def has_words(self, words: Sequence[str]) -> bool:
        """Whether each word is in the sender, a recipient or the subject, in any case."""
        text = "\n".join((self.sender, *self.recipients, self.subject)).casefold()
        return all(word.casefold() in text for word in words)


@dataclass(frozen=True, kw_only=True)
class Attachment:
    """A part of a mail besides the text and the HTML that are shown. `size` is in bytes."""

    filename: str | None
    content_type: str
    size: int
    part: Part


@dataclass(frozen=True, kw_only=True)
class Caught(Summary):
    """One mail with its text, its HTML, its header fields and its attachments.

    `is_cut` is True if the text or the HTML is longer than MOST_SHOWN bytes, or if the mail has
    more than MOST_PARTS parts. The rest is in the source only.
    """

    text: str | None
    html: str | None
    headers: tuple[tuple[str, str], ...]
    attached: tuple[Attachment, ...]
    is_cut: bool


def first_line(sender: str | None, recipients: Sequence[str], content: bytes) -> bytes:
    """Return the first line of a file: the envelope, and the number of attachments.

    The attachments are counted here, because a list reads only the beginning of each file.
    """
    _, _, attached = _find_texts(find_parts(BytesIO(content)))
    record = {"sender": sender, "recipients": recipients, "attachments": len(attached)}
    return _ENVELOPE + json.dumps(record).encode() + b"\r\n"


def summarise(path: Path) -> Summary:
    """Read the beginning of a file. Raises FileNotFoundError."""

    def read_summary(file: BinaryIO) -> Summary:
        return Summary(**_summary_fields(path, _read_beginning(file)))

    return _with_file(path, read_summary)


def read(path: Path) -> Caught:
    """Read the texts of a mail, and measure its attachments. Raises FileNotFoundError."""

    def read_mail(file: BinaryIO) -> Caught:
        beginning = _read_beginning(file)
        file.seek(len(beginning.line))
        parts = find_parts(file)
        text, html, others = _find_texts(parts)
        return Caught(
            **_summary_fields(path, beginning),
            text=_read_text(file, text),
            html=_read_text(file, html),
            headers=tuple(
                (name.decode(), decoded_field(value)) for name, value in fields(beginning.head)
            ),
            attached=tuple(_measure(file, part) for part in others),
            is_cut=len(parts) >= MOST_PARTS or _is_long(text) or _is_long(html),
        )

    return _with_file(path, read_mail)


def read_source(path: Path) -> Iterator[bytes]:
    """Read the mail as the client sent it, in blocks. The first block raises FileNotFoundError."""
    with path.open("rb") as file:
        start = len(_read_first_line(file))
        yield from read_blocks(file, start, file.seek(0, 2))


def read_attachment(path: Path, attachment: Attachment) -> Iterator[bytes]:
    """Read an attachment in blocks. The first block raises FileNotFoundError."""
    with path.open("rb") as file:
        yield from decoded(file, attachment.part)


def _with_file(path: Path, read_it: Callable[[BinaryIO], ResultT]) -> ResultT:
    """Call a function with an open file. Raises FileNotFoundError, and no other OSError."""
    try:
        with path.open("rb") as file:
            return read_it(file)
    except FileNotFoundError:
        raise
    except OSError as error:
        # The mail stays in the list, and its subject shows the error.
        return read_it(BytesIO(f"Subject: (cannot be read: {error.strerror})\r\n\r\n".encode()))


@dataclass(frozen=True)
class _Beginning:
    """The first line of a file, the beginning of the mail, and the size of the whole mail."""

    line: bytes
    head: bytes
    size: int


def _read_beginning(file: BinaryIO) -> _Beginning:
    line = _read_first_line(file)
    head = file.read(MOST_HEAD)
    return _Beginning(line, head, file.seek(0, 2) - len(line))


def _read_first_line(file: BinaryIO) -> bytes:
    """Read the envelope. It is b"" if another program wrote this file."""
    line = file.readline(_MOST_ENVELOPE)
    if line.startswith(_ENVELOPE):
        return line
    file.seek(0)
    return b""


def _summary_fields(path: Path, beginning: _Beginning) -> dict[str, Any]:
    """Return the arguments of Summary."""
    envelope = _parse_envelope(beginning.line)
    sender, recipients = str(envelope.get("sender") or ""), envelope.get("recipients")
    attachments = envelope.get("attachments")
    return {
        "id": path.stem,
        "received_at": datetime.fromtimestamp(int(path.stem[:19]) / 1e9, UTC),
        # The client of a mail that must not be answered sends `MAIL FROM:<>`.
        "sender": without_surrogates("" if sender == "<>" else sender),
        "recipients": tuple(
            map(without_surrogates, map(str, recipients if isinstance(recipients, list) else ()))
        ),
        "subject": first_field(beginning.head, b"subject") or "",
        "message_id": first_field(beginning.head, b"message-id"),
        "size": beginning.size,
        "attachments": attachments if isinstance(attachments, int) else None,
    }


def _parse_envelope(line: bytes) -> dict[str, Any]:
    try:
        envelope = json.loads(line.removeprefix(_ENVELOPE))
    except (ValueError, RecursionError):  # cut off, or another program wrote it
        return {}
    return envelope if isinstance(envelope, dict) else {}


def _find_texts(parts: Sequence[Part]) -> tuple[Part | None, Part | None, Sequence[Part]]:
    """Return the text and the HTML that are shown, and all other parts."""
    text, html = _find_text(parts, "text/plain"), _find_text(parts, "text/html")
    return text, html, [part for part in parts if part is not text and part is not html]


def _find_text(parts: Sequence[Part], content_type: str) -> Part | None:
    texts = (part for part in parts if part.content_type == content_type)
    return next((part for part in texts if part.disposition != "attachment"), None)


def _read_text(file: BinaryIO, part: Part | None) -> str | None:
    if part is None:
        return None
    text = _decode(b"".join(decoded(file, part, MOST_SHOWN)), part.charset)
    return without_surrogates(text).replace("\r\n", "\n")


def _is_long(part: Part | None) -> bool:
    return part is not None and part.end - part.start > MOST_SHOWN


def _measure(file: BinaryIO, part: Part) -> Attachment:
    size = sum(map(len, decoded(file, part)))
    return Attachment(filename=part.filename, content_type=part.content_type, size=size, part=part)


def _decode(content: bytes, charset: str) -> str:
    try:
        if codecs.lookup(charset).name not in _UNSUITABLE_CODECS:
            return content.decode(charset, "replace")
    except (LookupError, ValueError):  # an unknown charset, or a codec that is not for text
        pass
    return content.decode("latin-1")
