"""Decodes a part whose Content-Transfer-Encoding says that its bytes are not the file's own."""

import binascii
import re
from collections.abc import AsyncIterator, Mapping
from typing import Protocol

# A form whose file is encoded is larger than the file: in quoted-printable, each byte may take
# three, and each line of 76 ends with three more.
ENCODED_AT_MOST = 4  # times the size of the file

LONGEST_BLANKS = 1000  # bytes that wait for the line end, which an encoded line has after 76

_AS_IT_IS = {b"", b"7bit", b"8bit", b"binary"}

# Blanks at the end of a line were added on the way. The pattern begins at the first one only, or a
# long row of them would be searched once from each.
_PADDING = re.compile(rb"(?<![ \t])[ \t]++(?=\r?\n)")
_NO_ESCAPE = re.compile(rb"=(?![0-9A-Fa-f]{2}|\r?\n)")


class Decoder(Protocol):
    """Decodes a file piece by piece. Both methods raise MalformedEncoding."""

    def feed(self, piece: bytes) -> bytes:
        """Takes the next piece, and returns the bytes that are certain by now."""
        ...

    def finish(self) -> bytes:
        """Returns the bytes that were left when the file ended."""
        ...


def decoder_for(headers: Mapping[bytes, bytes]) -> Decoder | None:
    """Returns a decoder for a part with these headers, by lower-case name; None if none is due.

    Raises UnknownEncoding if the bytes are encoded otherwise than in RFC 2045, section 6. RFC 7578,
    section 4.8, has a Content-Encoding ignored, but then the download would not be the file.
    """
    if headers.get(b"content-encoding", b"").strip(b" \t").lower() not in {b"", b"identity"}:
        raise UnknownEncoding
    name = headers.get(b"content-transfer-encoding", b"").strip(b" \t").lower()
    if name in _AS_IT_IS:
        return None
    if name == b"base64":
        return _Base64()
    if name == b"quoted-printable":
        return _QuotedPrintable()
    raise UnknownEncoding


async def decoded(pieces: AsyncIterator[bytes], decoder: Decoder) -> AsyncIterator[bytes]:
    """Decodes a file while it arrives; raises MalformedEncoding."""
    async for piece in pieces:
        yield decoder.feed(piece)
    yield decoder.finish()


class _Base64:
    """RFC 2045, section 6.8; but a character that is not of the alphabet is an error."""

    def __init__(self) -> None:
        self._rest = b""
        self._padded = False

    def feed(self, piece: bytes) -> bytes:
        text = self._rest + piece.translate(None, b" \t\r\n")
        whole = len(text) // 4 * 4
        text, self._rest = text[:whole], text[whole:]
        if self._padded and (text or self._rest):
            raise MalformedEncoding
        self._padded = text.endswith(b"=")
        try:
            return binascii.a2b_base64(text, strict_mode=True)
        except binascii.Error as error:
            raise MalformedEncoding from error

    def finish(self) -> bytes:
        if self._rest:
            raise MalformedEncoding
        return b""


class _QuotedPrintable:
    """RFC 2045, section 6.7; but an equals sign that begins no escape is an error."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, piece: bytes) -> bytes:
        text = self._rest + piece
        # The next piece decides about an escape that has begun, and blanks that may end a line.
        certain = text.rstrip(b" \t\r")
        if certain.endswith(b"="):
            certain = certain[:-1]
        elif certain == text and text[-2:-1] == b"=":
            certain = text[:-2]
        self._rest = text[len(certain) :]
        if len(self._rest) > LONGEST_BLANKS or _NO_ESCAPE.search(
            text := _PADDING.sub(b"", certain)
        ):
            raise MalformedEncoding
        return binascii.a2b_qp(text)

    def finish(self) -> bytes:
        rest = self._rest.rstrip(b" \t")
        # The line end after an equals sign at the end belongs to the boundary of the form.
        if rest == b"=":
            return b""
        if b"=" in rest:
            raise MalformedEncoding
        return rest  # nothing, or a CR without LF, which some programs do not encode


class UnknownEncoding(Exception):
    """A file is sent as it is, or with Content-Transfer-Encoding: base64 or quoted-printable."""

    def __init__(self) -> None:
        super().__init__(self.__doc__)


class MalformedEncoding(Exception):
    """The file is not encoded as its Content-Transfer-Encoding says."""

    def __init__(self) -> None:
        super().__init__(self.__doc__)
