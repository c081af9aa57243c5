"""The file of a caught mail: written by the catcher, and read as far as it can be read.

The first line is the envelope as JSON, and the rest is the mail as it came. A client may send any
bytes, so nothing here takes them for a sound mail. Reading is bounded in memory and in time.
"""

import codecs
import contextlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email import message_from_bytes
from email.headerregistry import HeaderRegistry
from email.message import Message
from pathlib import Path
from typing import Any, cast

MOST_SHOWN = 2 * 1024 * 1024  # bytes of a mail that are read to show it
_MOST_HEAD = 32 * 1024  # bytes of a mail that are read for its header fields
_MOST_ENVELOPE = 128 * 1024  # bytes of the first line
_LONGEST_FIELD = 2_000  # bytes of one header field
# With more, the standard library recurses too deeply, and compares each line with each boundary.
_MOST_CONTAINERS = 30

_ENVELOPE = b"X-Envelope: "
_ATTACHMENT = re.compile(rb"(?i)\ncontent-disposition:\s*attachment")
_END_OF_HEAD = re.compile(rb"(?:\A|\n)\r?\n")
_FIELD = re.compile(rb"(?m)^([!-9;-~]+)[ \t]*:(.*(?:\n[ \t].*)*)")
_CONTENT_TYPE = re.compile(rb"(?im)^content-type[ \t]*:(.*(?:\n[ \t].*)*)")
_CONTAINER = re.compile(rb"(?i)\s*(?:multipart|message)/")
_SURROGATE = re.compile("[\ud800-\udfff]")
# The first two are made for short names: the time they take grows with the square of the length.
# The others warn of odd input.
_UNSUITABLE_CODECS = {"punycode", "idna", "unicode-escape", "raw-unicode-escape"}

# Every field is taken for plain text: the parsers of addresses and message ids raise errors of many
# kinds when a field is broken.
_decode_field = HeaderRegistry(use_default_map=False)


@dataclass(frozen=True, kw_only=True)
class Summary:
    """A mail in a list. `size` is in bytes; `attachments` is None where it was not counted."""

    id: str
    received_at: datetime
    sender: str
    recipients: tuple[str, ...]
    subject: str
    message_id: str | None
    size: int
    attachments: int | None


@dataclass(frozen=True, kw_only=True)
class Caught(Summary):
    """One mail, with its texts, and its first bytes as they came.

    `is_cut` says that the mail is longer than MOST_SHOWN, and that the rest is left out.
    """

    text: str | None
    html: str | None
    headers: tuple[tuple[str, str], ...]
    raw: bytes
    is_cut: bool


def first_line(sender: str | None, recipients: Sequence[str], content: bytes) -> bytes:
    """Write the first line of a file: the envelope, and the number of attachments.

    The attachments are counted now, because later only the beginning of the file is read.
    """
    attachments = sum(1 for _ in _ATTACHMENT.finditer(content))
    record = {"sender": sender, "recipients": recipients, "attachments": attachments}
    return _ENVELOPE + json.dumps(record).encode() + b"\r\n"


def summarise(path: Path) -> Summary:
    """Read the beginning of a file. Raises FileNotFoundError."""
    return Summary(**_facts(path, _open(path, _MOST_HEAD)))


def read(path: Path) -> Caught:
    """Read the first MOST_SHOWN bytes of a mail. Raises FileNotFoundError."""
    file = _open(path, MOST_SHOWN)
    text, html = _texts(file.mail)
    return Caught(
        **_facts(path, file),
        text=text,
        html=html,
        headers=tuple((name.decode(), _readable(value)) for name, value in _fields(file.mail)),
        raw=file.mail,
        is_cut=len(file.mail) < file.size,
    )


@dataclass(frozen=True)
class _File:
    """The first line of a file, and the beginning of the mail; `size` is that of the whole mail."""

    first_line: bytes
    mail: bytes
    size: int


def _open(path: Path, at_most: int) -> _File:
    try:
        with path.open("rb") as file:
            line = file.readline(_MOST_ENVELOPE)
            if not line.startswith(_ENVELOPE):  # the catcher did not write this file
                file.seek(0)
                line = b""
            mail = file.read(at_most)
            return _File(line, mail, file.seek(0, 2) - len(line))
    except FileNotFoundError:
        raise
    except OSError as error:
        # The other mails of a list are shown all the same, and this one's subject says why not.
        return _File(b"", f"Subject: (cannot be read: {error.strerror})\r\n\r\n".encode(), 0)


def _facts(path: Path, file: _File) -> dict[str, Any]:
    """Collect the fields of a summary."""
    envelope = _envelope(file.first_line)
    sender, recipients = envelope.get("sender"), envelope.get("recipients")
    attachments = envelope.get("attachments")
    return {
        "id": path.stem,
        "received_at": datetime.fromtimestamp(int(path.stem[:19]) / 1e9, UTC),
        "sender": _sound(str(sender or "")),
        "recipients": tuple(
            map(_sound, map(str, recipients if isinstance(recipients, list) else ()))
        ),
        "subject": _field(file.mail, b"subject") or "",
        "message_id": _field(file.mail, b"message-id"),
        "size": file.size,
        "attachments": attachments if isinstance(attachments, int) else None,
    }


def _envelope(line: bytes) -> dict[str, Any]:
    try:
        envelope = json.loads(line.removeprefix(_ENVELOPE))
    except (ValueError, RecursionError):  # cut off, or never ours
        return {}
    return envelope if isinstance(envelope, dict) else {}


def _field(mail: bytes, wanted: bytes) -> str | None:
    """Return the first header field of this name."""
    return next((_readable(value) for name, value in _fields(mail) if name.lower() == wanted), None)


def _fields(mail: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Find the header fields, in the first _MOST_HEAD bytes of a mail."""
    end = _END_OF_HEAD.search(mail, 0, _MOST_HEAD)
    head = mail[: end.start() if end else _MOST_HEAD]
    return ((field[1], field[2]) for field in _FIELD.finditer(head))


def _readable(value: bytes) -> str:
    """Decode the value of a header field, encoded words included (RFC 2047)."""
    text = value[:_LONGEST_FIELD].decode("utf-8", "replace")
    text = text.replace("\r\n", "").replace("\n", "").strip()
    try:
        return _sound(str(_decode_field("subject", text)))
    except Exception:  # noqa: BLE001 -- a broken encoded word may raise whatever its codec raises
        return text


def _texts(mail: bytes) -> tuple[str | None, str | None]:
    """Find the text and the HTML of a mail; where it cannot be parsed, its bytes are the text."""
    types = [match[1] for match in _CONTENT_TYPE.finditer(mail)]
    containers = sum(1 for value in types if _CONTAINER.match(value))
    if containers <= _MOST_CONTAINERS and max(map(len, types), default=0) <= _LONGEST_FIELD:
        # The standard library's parser raises errors of many kinds.
        with contextlib.suppress(Exception):
            parts = list(_parts(message_from_bytes(mail)))
            return _text(parts, "text/plain"), _text(parts, "text/html")
    return mail.decode("utf-8", "replace").replace("\r\n", "\n"), None


def _parts(message: Message) -> Iterator[Message]:
    """List the parts that contain no others. A mail that is attached to a mail is one part."""
    if message.is_multipart() and message.get_content_maintype() == "multipart":
        for part in cast("Sequence[Message]", message.get_payload()):
            yield from _parts(part)
    else:
        yield message


def _text(parts: Sequence[Message], kind: str) -> str | None:
    for part in parts:
        if _kind(part) == kind and part.get_content_disposition() != "attachment":
            content = cast("bytes", part.get_payload(decode=True))
            text = _decode(content, part.get_content_charset("utf-8"))
            return _sound(text).replace("\r\n", "\n")
    return None


def _kind(part: Message) -> str:
    """Return the content type; a multipart that has no parts is shown as text."""
    broken = part.get_content_maintype() == "multipart"
    return "text/plain" if broken else part.get_content_type()


def _decode(content: bytes, charset: str) -> str:
    try:
        if codecs.lookup(charset).name not in _UNSUITABLE_CODECS:
            return content.decode(charset, "replace")
    except (LookupError, ValueError):  # no such charset, or one that decodes nothing
        pass
    return content.decode("latin-1")


def _sound(text: str) -> str:
    """Replace lone surrogates, which no page and no JSON can contain."""
    return _SURROGATE.sub("\N{REPLACEMENT CHARACTER}", text)
