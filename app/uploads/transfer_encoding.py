"""Decodes the Content-Transfer-Encodings base64 and quoted-printable while a file arrives."""

import binascii
import re
from collections.abc import AsyncIterator, Mapping
from typing import Protocol

# An encoded file is at most so many times as large as the file. In quoted-printable a byte may
# become three, such as `=C3`, and every line of 76 characters ends with three more.
ENCODED_AT_MOST = 4

# Bytes of spaces and tabs that are kept until the line ends. An encoded line has 76 characters.
LONGEST_BLANKS = 1000

_AS_IT_IS = {"", "7bit", "8bit", "binary"}

# Spaces and tabs at the end of a line, which a mail server may have added (RFC 2045, section 6.7).
# The lookbehind lets a match start only at the first of them. Without it the search would start at
# each of them again, and take time that grows with the square of their number.
_PADDING = re.compile(rb"(?<![ \t])[ \t]++(?=\r?\n)")
_NO_ESCAPE = re.compile(rb"=(?![0-9A-Fa-f]{2}|\r?\n)")


class Decoder(Protocol):
    """Decodes a file piece by piece.

    Both methods raise MalformedEncoding.
    """

    def feed(self, piece: bytes) -> bytes:
        """Take the next piece, and return all bytes that can be decoded by now."""
        ...

    def finish(self) -> bytes:
        """Return the remaining bytes at the end of the file."""
        ...


def decoder_for(headers: Mapping[str, str]) -> Decoder | None:
    """Return a decoder for a part, or None if the part is not encoded.

    `headers` has lower-case names. Raises UnknownEncoding for an encoding that is not in RFC 2045,
    section 6, and for a Content-Encoding. RFC 7578, section 4.8, says to ignore a Content-Encoding,
    but then a download would return other bytes than those of the file.
    """
    if headers.get("content-encoding", "").strip(" \t").lower() not in {"", "identity"}:
        raise UnknownEncoding
    name = headers.get("content-transfer-encoding", "").strip(" \t").lower()
    if name in _AS_IT_IS:
        return None
    if name == "base64":
        return _Base64()
    if name == "quoted-printable":
        return _QuotedPrintable()
    raise UnknownEncoding


async def decoded(pieces: AsyncIterator[bytes], decoder: Decoder) -> AsyncIterator[bytes]:
    """Yield the decoded pieces of a file as it arrives. Raises MalformedEncoding."""
    async for piece in pieces:
        yield decoder.feed(piece)
    yield decoder.finish()


class _Base64:
    """Decodes base64 (RFC 2045, section 6.8), but refuses characters outside its alphabet.

    Four characters are three bytes. So of the piece "SGVsbG" the first four are decoded, to "Hel",
    and "bG" waits for the next piece, "8=".
    """

    def __init__(self) -> None:
        self._rest = b""  # up to three characters
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
    """Decodes quoted-printable (RFC 2045, section 6.7), but refuses an `=` without an escape.

    Of the piece "na=C3=AFve =C", all but "=C" is decoded; "=C" waits for the next piece, "3". Of
    the piece "naive ", only "naive" is decoded, because a space at the end of a line is dropped.
    """

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, piece: bytes) -> bytes:
        text = self._rest + piece
        # 1. Keep back blanks at the end, because the line may end behind them, and an unfinished
        # escape of one or two characters, such as "=" or "=C".
        certain = text.rstrip(b" \t\r")
        if certain.endswith(b"="):
            certain = certain[:-1]
        elif certain == text and text[-2:-1] == b"=":
            certain = text[:-2]
        self._rest = text[len(certain) :]
        # 2. Drop blanks at the ends of lines, check the escapes, and decode.
        if len(self._rest) > LONGEST_BLANKS or _NO_ESCAPE.search(
            text := _PADDING.sub(b"", certain)
        ):
            raise MalformedEncoding
        return binascii.a2b_qp(text)

    def finish(self) -> bytes:
        rest = self._rest.rstrip(b" \t")
        # A soft line break may end the file: the line end after its `=` belongs to the boundary.
        if rest == b"=":
            return b""
        if b"=" in rest:
            raise MalformedEncoding
        return rest  # nothing, or a CR without LF: some programs do not encode it


class UnknownEncoding(Exception):
    """A file is sent as it is, or with Content-Transfer-Encoding: base64 or quoted-printable."""

    def __init__(self) -> None:
        super().__init__(self.__doc__)


class MalformedEncoding(Exception):
    """The file is not encoded as its Content-Transfer-Encoding says."""

    def __init__(self) -> None:
        super().__init__(self.__doc__)
