"""The file format of caught mails. A broken mail is read as far as possible.

The first line is the envelope as JSON, and the rest is the mail as the client sent it:

    X-Envelope: {"sender": "a@example.com", "recipients": ["b@example.org"], "attachments": 0}
    From: a@example.com
    ...

A client may send any bytes, so no code here relies on a valid mail. Reading is bounded in memory
and in time.
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
# Multipart and message parts in one mail. With more of them, nested, the standard library's parser
# recurses too deeply and compares each line with each boundary.
_MOST_CONTAINERS = 30

_ENVELOPE = b"X-Envelope: "
_ATTACHMENT = re.compile(rb"(?i)\ncontent-disposition:\s*attachment")
_END_OF_HEAD = re.compile(rb"(?:\A|\n)\r?\n")
_FIELD = re.compile(rb"(?m)^([!-9;-~]+)[ \t]*:(.*(?:\n[ \t].*)*)")
_CONTENT_TYPE = re.compile(rb"(?im)^content-type[ \t]*:(.*(?:\n[ \t].*)*)")
_CONTAINER = re.compile(rb"(?i)\s*(?:multipart|message)/")
_SURROGATE = re.compile("[\ud800-\udfff]")
# The first two take time that grows with the square of the length. The others emit warnings for
# invalid escapes.
_UNSUITABLE_CODECS = {"punycode", "idna", "unicode-escape", "raw-unicode-escape"}

# Parses every field as unstructured text, because the parsers of addresses and message ids raise
# many kinds of errors for a broken field.
_parse_unstructured = HeaderRegistry(use_default_map=False)


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


@dataclass(frozen=True, kw_only=True)
class Caught(Summary):
    """One mail with its text, its HTML and its header fields.

    `raw` has the first MOST_SHOWN bytes of the mail as the client sent it. `is_cut` is True if the
    mail is longer; then the text and the HTML may be cut too.
    """

    text: str | None
    html: str | None
    headers: tuple[tuple[str, str], ...]
    raw: bytes
    is_cut: bool


def first_line(sender: str | None, recipients: Sequence[str], content: bytes) -> bytes:
    """Return the first line of a file: the envelope, and the number of attachments.

    The attachments are counted here, because a list reads only the beginning of each file.
    """
    attachments = sum(1 for _ in _ATTACHMENT.finditer(content))
    record = {"sender": sender, "recipients": recipients, "attachments": attachments}
    return _ENVELOPE + json.dumps(record).encode() + b"\r\n"


def summarise(path: Path) -> Summary:
    """Read the beginning of a file. Raises FileNotFoundError."""
    return Summary(**_summary_fields(path, _read_file(path, _MOST_HEAD)))


def read(path: Path) -> Caught:
    """Read the first MOST_SHOWN bytes of a mail. Raises FileNotFoundError."""
    file = _read_file(path, MOST_SHOWN)
    text, html = _text_and_html(file.mail)
    return Caught(
        **_summary_fields(path, file),
        text=text,
        html=html,
        headers=tuple((name.decode(), _decoded_field(value)) for name, value in _fields(file.mail)),
        raw=file.mail,
        is_cut=len(file.mail) < file.size,
    )


@dataclass(frozen=True)
class _File:
    """The first line of a file, the beginning of the mail, and the size of the whole mail."""

    first_line: bytes
    mail: bytes
    size: int


def _read_file(path: Path, at_most: int) -> _File:
    try:
        with path.open("rb") as file:
            line = file.readline(_MOST_ENVELOPE)
            if not line.startswith(_ENVELOPE):  # another program wrote this file
                file.seek(0)
                line = b""
            mail = file.read(at_most)
            return _File(line, mail, file.seek(0, 2) - len(line))
    except FileNotFoundError:
        raise
    except OSError as error:
        # The mail stays in the list, and its subject shows the error.
        return _File(b"", f"Subject: (cannot be read: {error.strerror})\r\n\r\n".encode(), 0)


def _summary_fields(path: Path, file: _File) -> dict[str, Any]:
    """Return the arguments of Summary."""
    envelope = _envelope(file.first_line)
    sender, recipients = envelope.get("sender"), envelope.get("recipients")
    attachments = envelope.get("attachments")
    return {
        "id": path.stem,
        "received_at": datetime.fromtimestamp(int(path.stem[:19]) / 1e9, UTC),
        "sender": _without_surrogates(str(sender or "")),
        "recipients": tuple(
            map(_without_surrogates, map(str, recipients if isinstance(recipients, list) else ()))
        ),
        "subject": _field(file.mail, b"subject") or "",
        "message_id": _field(file.mail, b"message-id"),
        "size": file.size,
        "attachments": attachments if isinstance(attachments, int) else None,
    }


def _envelope(line: bytes) -> dict[str, Any]:
    try:
        envelope = json.loads(line.removeprefix(_ENVELOPE))
    except (ValueError, RecursionError):  # cut off, or another program wrote it
        return {}
    return envelope if isinstance(envelope, dict) else {}


def _field(mail: bytes, wanted: bytes) -> str | None:
    """Return the first header field with this lower-case name, or None."""
    return next(
        (_decoded_field(value) for name, value in _fields(mail) if name.lower() == wanted), None
    )


def _fields(mail: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Find the names and values of the header fields in the first _MOST_HEAD bytes."""
    end = _END_OF_HEAD.search(mail, 0, _MOST_HEAD)
    head = mail[: end.start() if end else _MOST_HEAD]
    return ((field[1], field[2]) for field in _FIELD.finditer(head))


def _decoded_field(value: bytes) -> str:
    """Return the value of a header field as text, with encoded-words decoded (RFC 2047)."""
    text = value[:_LONGEST_FIELD].decode("utf-8", "replace")
    text = text.replace("\r\n", "").replace("\n", "").strip()
    try:
        return _without_surrogates(str(_parse_unstructured("subject", text)))
    except Exception:  # noqa: BLE001 -- a broken encoded-word raises any error of its codec
        return text


def _text_and_html(mail: bytes) -> tuple[str | None, str | None]:
    """Return the text and the HTML of a mail. If it cannot be parsed, its bytes are the text."""
    types = [match[1] for match in _CONTENT_TYPE.finditer(mail)]
    containers = sum(1 for value in types if _CONTAINER.match(value))
    if containers <= _MOST_CONTAINERS and max(map(len, types), default=0) <= _LONGEST_FIELD:
        # The standard library's parser raises many kinds of errors for a broken mail.
        with contextlib.suppress(Exception):
            parts = list(_parts(message_from_bytes(mail)))
            return _find_text(parts, "text/plain"), _find_text(parts, "text/html")
    return mail.decode("utf-8", "replace").replace("\r\n", "\n"), None


def _parts(message: Message) -> Iterator[Message]:
    """List all parts that are not multipart. An attached mail is one part, and is not opened."""
    if message.is_multipart() and message.get_content_maintype() == "multipart":
        for part in cast("Sequence[Message]", message.get_payload()):
            yield from _parts(part)
    else:
        yield message


def _find_text(parts: Sequence[Message], kind: str) -> str | None:
    for part in parts:
        if _content_type(part) == kind and part.get_content_disposition() != "attachment":
            content = cast("bytes", part.get_payload(decode=True))
            text = _decode(content, part.get_content_charset("utf-8"))
            return _without_surrogates(text).replace("\r\n", "\n")
    return None


def _content_type(part: Message) -> str:
    """Return the content type of a part. A multipart without parts counts as text."""
    broken = part.get_content_maintype() == "multipart"
    return "text/plain" if broken else part.get_content_type()


def _decode(content: bytes, charset: str) -> str:
    try:
        if codecs.lookup(charset).name not in _UNSUITABLE_CODECS:
            return content.decode(charset, "replace")
    except (LookupError, ValueError):  # an unknown charset, or a codec that is not for text
        pass
    return content.decode("latin-1")


def _without_surrogates(text: str) -> str:
    """Replace lone surrogates, because neither a page nor JSON can contain them."""
    return _SURROGATE.sub("\N{REPLACEMENT CHARACTER}", text)
