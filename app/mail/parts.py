"""The parts of a mail (RFC 2046), found in its file and read from it block by block.

The standard library's parser holds a whole mail in memory, several times. Here memory does not
depend on the size of the mail. Any bytes are accepted: a broken part is a text.
"""

import re
from binascii import a2b_base64, a2b_qp
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from email.message import Message
from typing import BinaryIO

from app.mail.fields import (
    LONGEST_FIELD,
    MOST_HEAD,
    decode_words,
    fields,
    unfolded,
    without_surrogates,
)

# The parts and containers that are found. The rest of a mail is only in its source.
MOST_PARTS = 1_000
MOST_CONTAINERS = 100  # in each other; a multipart that is nested deeper counts as a text

_BLOCK = 64 * 1024  # bytes
_BLANKS = b" \t\r\n"
_LINE_OF_HEAD = re.compile(rb"[!-9;-~]+[ \t]*:|[ \t]|From ")  # the last one is of mbox files
_LINE_WITH_HYPHENS = re.compile(rb"\n(--[^\n]*)")
_TOKEN = r"[0-9a-z!#$&^_.+-]{1,127}"  # noqa: S105 -- of a media type (RFC 6838, 4.2)  # nosec
_MEDIA_TYPE = re.compile(f"{_TOKEN}/{_TOKEN}")
_UNKNOWN = "application/octet-stream"
_ABOUT_THE_BODY = {b"content-type", b"content-disposition", b"content-transfer-encoding"}
_BASE64 = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/="
_NOT_BASE64 = bytes(range(256)).translate(None, _BASE64)


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A part without parts of its own. `start` and `end` are the place of its body in the file.

    `disposition` and `encoding` are its Content-Disposition and Content-Transfer-Encoding.
    """

    content_type: str
    charset: str
    filename: str | None
    disposition: str | None
    encoding: str
    start: int
    end: int


def find_parts(file: BinaryIO) -> list[Part]:
    """Find the parts of the mail that begins at the present position of a file, in their order.

    Reads the file to its end, and raises OSError if that fails. An attached mail is one part, and
    is not opened.
    """
    return _Scan(file).run()


def decoded(file: BinaryIO, part: Part, at_most: int | None = None) -> Iterator[bytes]:
    """Read the body of a part in blocks, without its transfer encoding (RFC 2045, section 6).

    `at_most` is the number of bytes that are read. Characters that do not belong to base64 are
    left out, and every other error in an encoding stays in the result as it is.
    """
    end = part.end if at_most is None else min(part.end, part.start + at_most)
    blocks = read_blocks(file, part.start, end)
    decode = _DECODERS.get(part.encoding)
    return decode(blocks) if decode else blocks


def read_blocks(file: BinaryIO, start: int, end: int) -> Iterator[bytes]:
    """Read a file from one position up to another, in blocks of at most 64 KiB."""
    file.seek(start)
    while start < end and (block := file.read(min(_BLOCK, end - start))):
        start += len(block)
        yield block


@dataclass(slots=True)
class _Container:
    """A multipart that is not closed yet. `start` is the place of its preamble."""

    delimiter: bytes
    start: int
    has_parts: bool = False


class _Scan:
    """Reads a mail once, line by line. Delimiter lines end its parts (RFC 2046, section 5.1.1).

    For example, with the boundary "b":

        Content-Type: multipart/mixed; boundary=b   the head of a container, an empty line,
                                                    and the preamble, which is left out
        --b                                         a delimiter: a part begins
        Content-Type: text/plain                    its head, and an empty line

        Dear Ada                                    its body
        --b--                                       the last delimiter closes the container
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._next_line = file.tell()
        self._containers: list[_Container] = []  # that are open, the innermost last
        # The depth of the container for each delimiter. Each line that begins with two hyphens is
        # looked up here, and a hostile mail has millions of them.
        self._delimiters: dict[bytes, int] = {}
        self._parts: list[Part] = []

    def run(self) -> list[Part]:
        while self._read_part() and len(self._parts) < MOST_PARTS:
            pass
        return self._parts

    def _read_part(self) -> bool:
        """Read a part, or the beginning of a container. Return whether another part follows."""
        # 1. The head
        message = _parse_head(self._read_head())
        is_container = self._open_container(message)
        # 2. The body, or the preamble, up to a delimiter
        start = self._next_line
        end, delimiter = self._skip_to_delimiter()
        if not is_container:
            self._parts.append(_make_part(message, start, end))
        # 3. The delimiters, up to one that begins the next part. Between them are epilogues.
        while delimiter:
            depth = self._delimiters[delimiter]
            self._close_containers(depth + 1, end)
            container = self._containers[depth]
            if delimiter == container.delimiter:
                container.has_parts = True
                return True
            self._close_containers(depth, end)
            end, delimiter = self._skip_to_delimiter()
        self._close_containers(0, end)
        return False

    def _read_head(self) -> bytes:
        """Read header fields and the empty line after them. Return at most MOST_HEAD bytes."""
        head = b""
        while line := self._read_line():
            if not line.strip(b"\r\n"):
                break
            if not _LINE_OF_HEAD.match(line):  # the body begins without an empty line
                self._next_line -= len(line)
                self._file.seek(self._next_line)
                break
            if len(head) < MOST_HEAD:
                head += line
        return head[:MOST_HEAD]

    def _open_container(self, message: Message) -> bool:
        """Open a container if the head of a part is that of a multipart with a boundary."""
        content_type = _read_parameter(message.get_content_type) or ""
        boundary = _read_parameter(message.get_boundary)
        if not content_type.startswith("multipart/") or not boundary:
            return False
        delimiter = b"--" + boundary.encode(errors="replace")
        delimiters = (delimiter, delimiter + b"--")
        if len(self._containers) == MOST_CONTAINERS or self._delimiters.keys() & set(delimiters):
            return False
        self._delimiters |= dict.fromkeys(delimiters, len(self._containers))
        self._containers.append(_Container(delimiter, self._next_line))
        return True

    def _skip_to_delimiter(self) -> tuple[int, bytes]:
        """Read up to the next delimiter. Return the end of the body before it, and the delimiter.

        The line break before a delimiter belongs to the delimiter. At the end of the file, there is
        no delimiter: it is b"".
        """
        if not self._containers:
            return self._file.seek(0, 2), b""
        start = self._next_line
        position = start - 1  # of the line break before the body
        while True:
            # 1. Look at the lines of a block that begin with two hyphens.
            self._file.seek(position)
            block = self._file.read(_BLOCK)
            is_last = len(block) < _BLOCK
            for line in _LINE_WITH_HYPHENS.finditer(block):
                delimiter = line[1].rstrip(_BLANKS)
                if delimiter in self._delimiters and (is_last or line.end() < len(block)):
                    self._next_line = position + line.end() + 1
                    self._file.seek(self._next_line)
                    end = position + line.start()
                    end -= block[line.start() - 1 : line.start()] == b"\r"
                    return max(start, end), delimiter
            if is_last:
                return max(start, position + len(block)), b""
            # 2. The next block begins with the line break before the last line, which may be cut.
            # A line that fills a block is no delimiter, and is skipped.
            last_line = block.rfind(b"\n") - 1
            position += last_line if last_line > 0 else len(block) - 1

    def _read_line(self) -> bytes:
        line = self._file.readline(_BLOCK)
        self._next_line += len(line)
        return line

    def _close_containers(self, depth: int, end: int) -> None:
        """Close the containers from this depth on. One without parts is itself a text."""
        while len(self._containers) > depth:
            container = self._containers.pop()
            del self._delimiters[container.delimiter]
            del self._delimiters[container.delimiter + b"--"]
            if not container.has_parts:
                self._parts.append(_make_part(Message(), container.start, end))


def _parse_head(head: bytes) -> Message:
    """Return a message with those header fields that describe the body."""
    message = Message()
    for name, value in fields(head):
        key = name.lower()
        if key in _ABOUT_THE_BODY and key.decode() not in message and len(value) <= LONGEST_FIELD:
            message[key.decode()] = unfolded(value)
    return message


def _make_part(message: Message, start: int, end: int) -> Part:
    content_type = _read_parameter(message.get_content_type) or "text/plain"
    if content_type.startswith("multipart/"):  # without a boundary
        content_type = "text/plain"
    filename = _read_parameter(message.get_filename)
    return Part(
        content_type=content_type if _MEDIA_TYPE.fullmatch(content_type) else _UNKNOWN,
        charset=_read_parameter(message.get_content_charset) or "utf-8",
        filename=filename and without_surrogates(decode_words(filename)),
        disposition=_read_parameter(message.get_content_disposition),
        encoding=str(message.get("content-transfer-encoding", "")).lower(),
        start=start,
        end=end,
    )


def _read_parameter(read: Callable[[], str | None]) -> str | None:
    """Return what a method of Message finds, or None if its header field is broken."""
    try:
        return read()
    except Exception:  # noqa: BLE001 -- the standard library's parser raises many kinds of errors
        return None


def _from_base64(blocks: Iterator[bytes]) -> Iterator[bytes]:
    """Decode base64. The first "=" is its end (RFC 2045, section 6.8)."""
    rest = b""
    for block in blocks:
        letters, padding, _ = (rest + block.translate(None, _NOT_BASE64)).partition(b"=")
        whole = len(letters) - len(letters) % 4
        yield a2b_base64(letters[:whole])
        rest = letters[whole:]
        if padding:
            break
    if len(rest) > 1:  # one letter has only six bits
        yield a2b_base64(rest + b"==")


def _from_quoted_printable(blocks: Iterator[bytes]) -> Iterator[bytes]:
    rest = b""
    for block in blocks:
        data = rest + block
        # An escape may be cut by the end of the block: "=", "=3" or "=\r".
        cut = data.find(b"=", max(0, len(data) - 2))
        cut = len(data) if cut < 0 else cut
        yield a2b_qp(data[:cut])
        rest = data[cut:]
    yield a2b_qp(rest)


_DECODERS: dict[str, Callable[[Iterator[bytes]], Iterator[bytes]]] = {
    "base64": _from_base64,
    "quoted-printable": _from_quoted_printable,
}
