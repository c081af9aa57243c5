"""Reads the one file of a multipart/form-data body (RFC 7578) while the body arrives."""

import re
from collections.abc import AsyncIterator
from dataclasses import dataclass

from multipart import MultipartError, MultipartSegment, PushMultipartParser, header_unquote

from app.uploads.names import display_name, extended_value, with_charset
from app.uploads.transfer_encoding import ENCODED_AT_MOST, decoded, decoder_for

FIELD = "file"

MAX_HEADERS = 8  # of a part
MAX_HEADER_BYTES = 4096
# Bytes of a form that are not content of its file: headers, delimiters, and text after the last
# part. The headers of a part need at most half of it.
OVERHEAD_BYTES = 64 * 1024

# RFC 2046, section 5.1.1.
_BOUNDARY = re.compile(r"[0-9A-Za-z'()+_,./:=? -]{0,69}[0-9A-Za-z'()+_,./:=?-]")

# RFC 6838, section 4.2.
_NAME = r"[0-9a-z][0-9a-z!#$&^_.+-]{0,126}"
_MEDIA_TYPE = re.compile(rf"{_NAME}/{_NAME}")

# A parameter of a header, such as `; name="file"`. Its value is a quoted string, or ends at the
# next semicolon. The third group is the text between a quoted string and the next semicolon. No
# part of a match is searched twice, so the time is linear.
_PARAMETER = re.compile(
    r';[ \t]*+([^\s;="]*+)[ \t]*+=[ \t]*+("(?:[^"\\]|\\.)*+"|[^;]*+)([^;]*+)', re.DOTALL
)
_END_OF_HEADERS = b"\r\n\r\n"
_BARE_LINE_BREAK = re.compile(rb"\r(?!\n)|(?<!\r)\n")

# A part begins with a MultipartSegment. Pieces of its content follow, and then None.
_Events = AsyncIterator[MultipartSegment | bytes | None]


def largest_form(size: int) -> int:
    """Return the largest size in bytes of a form with a file of `size` bytes, in any encoding."""
    return ENCODED_AT_MOST * size + OVERHEAD_BYTES


@dataclass(frozen=True)
class PartInfo:
    """A file as the client describes it.

    Args:
        filename: a name that is safe to show.
        content_type: the declared media type, with its charset if it is text. It may be wrong.
        is_encoded: whether the file has a Content-Transfer-Encoding, so that the part is larger
            than the file.
    """

    filename: str
    content_type: str
    is_encoded: bool = False


async def file_part(
    content_type: str, body: AsyncIterator[bytes]
) -> tuple[PartInfo, AsyncIterator[bytes]]:
    """Read a form up to its file. Return a description of the file and an iterator over its bytes.

    The form must have one part, named `file`, and no other. The iterator decodes a
    Content-Transfer-Encoding (RFC 7578, section 4.7). It also reads the rest of the form after the
    file, and raises if that is malformed. So the caller must discard the file unless the iterator
    ends without an error.

    Args:
        content_type: the request's Content-Type header.
        body: the chunks of the request's body as they arrive. A chunk may be empty.

    This function and the iterator raise NotMultipart, MalformedMultipart, InvalidForm,
    UnknownEncoding and MalformedEncoding, and the errors of `body`.
    """
    events = _events(_boundary(content_type), body)
    async for event in events:
        if isinstance(event, MultipartSegment):
            headers = _headers(event)
            disposition = _disposition(headers)
            decoder = decoder_for(headers)
            info = PartInfo(
                _filename(disposition),
                _declared_type(headers.get("content-type", "")),
                is_encoded=decoder is not None,
            )
            content = _content(events)
            return info, content if decoder is None else decoded(content, decoder)
    raise InvalidForm(f"/{FIELD}", "this field is required")


async def _events(boundary: str, body: AsyncIterator[bytes]) -> _Events:
    """Parse a form while it arrives. Raises MalformedMultipart.

    For example, with the boundary `X` and one file of 5 bytes, a form looks like this:

        --X
        Content-Disposition: form-data; name="file"; filename="a.txt"
        Content-Type: text/plain

        Hello
        --X--

    It yields a MultipartSegment with the two headers, then b"Hello", then None. A large file
    arrives in many chunks, and almost every chunk is yielded as it is.
    """
    # Latin-1 decodes any byte, so that a name that is not UTF-8 is no error. See `_text`.
    parser = PushMultipartParser(
        boundary,
        max_header_size=MAX_HEADER_BYTES,
        max_header_count=MAX_HEADERS,
        header_charset="latin-1",
    )
    overhead = 0
    try:
        async for chunk in _head_first(b"--" + boundary.encode(), body):
            overhead += len(chunk)
            # The parser would take an empty chunk for the end of the body.
            for event in parser.parse(chunk) if chunk else ():
                overhead -= len(event) if isinstance(event, bytes) else 0
                yield event
            # A form may be four times as large as the largest file (see `largest_form`).
            if overhead > OVERHEAD_BYTES:
                raise MalformedMultipart
        parser.close()  # raises if the closing delimiter is missing
    except MultipartError as error:
        raise MalformedMultipart from error


async def _head_first(delimiter: bytes, body: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Yield the form up to the end of the first part's headers, then the rest as it arrives.

    The parser takes the start of a chunk for the start of a line, and looks for a bare LF only in
    headers that are not complete. It gets the head in one chunk, so that the answer does not
    depend on the chunks of the body. Raises MalformedMultipart if text precedes the delimiter, or
    the head has a CR or LF alone.
    """
    head, end = bytearray(), -1
    async for chunk in body:
        head += chunk
        # The end of the headers may have begun in the chunk before.
        end = head.find(_END_OF_HEADERS, max(0, len(head) - len(chunk) - len(_END_OF_HEADERS) + 1))
        if end >= 0 or len(head) > OVERHEAD_BYTES:
            break
    # RFC 2046, section 5.1.1, allows a preamble here. No browser or client sends one in form-data.
    if not head.removeprefix(b"\r\n").startswith(delimiter):
        raise MalformedMultipart
    size = len(head) if end < 0 else end + len(_END_OF_HEADERS)
    # A CR or LF alone begins another header for some programs, and two end the headers.
    if _BARE_LINE_BREAK.search(head, 0, size):
        raise MalformedMultipart
    yield bytes(head[:size])
    yield bytes(head[size:])
    async for chunk in body:
        yield chunk


async def _content(events: _Events) -> AsyncIterator[bytes]:
    """Yield the content of the file, and read the rest of the form. Refuse another part."""
    async for event in events:
        if isinstance(event, MultipartSegment):
            _disposition(_headers(event))
            raise InvalidForm(f"/{FIELD}", "only one file can be uploaded at a time")
        if event is not None:
            yield event


def _boundary(content_type: str) -> str:
    """Return the boundary that a Content-Type header names. Raises NotMultipart."""
    try:
        media_type, parameters = _parsed(content_type)
    except MalformedMultipart:
        raise NotMultipart from None
    boundary = parameters.get("boundary", "")
    if media_type != "multipart/form-data" or not _BOUNDARY.fullmatch(boundary):
        raise NotMultipart
    return boundary


def _headers(part: MultipartSegment) -> dict[str, str]:
    """Return the headers of a part, with names in lower case. Raises MalformedMultipart."""
    headers = {name.lower(): value for name, value in part.headerlist}
    # Of two headers with the same name, some programs use the first and some the last.
    if len(headers) < len(part.headerlist):
        raise MalformedMultipart
    return headers


def _disposition(headers: dict[str, str]) -> dict[str, str]:
    """Return the parameters of a part's Content-Disposition. Refuse any part but the file."""
    _, parameters = _parsed(headers["content-disposition"])
    if "name" not in parameters:
        raise MalformedMultipart
    if parameters["name"] != FIELD:
        raise InvalidForm("", f"the form takes the field '{FIELD}' and no other")
    return parameters


def _parsed(header: str) -> tuple[str, dict[str, str]]:
    """Split a header into its value and its parameters, both names in lower case.

    Raises MalformedMultipart if a parameter occurs twice, because some programs use the first and
    some the last, and if text follows a quoted string, as in `name="file"x`.

    Not by `multipart.parse_options_header`, which cuts a value without quotes at the first space
    or bracket: it reads `filename=a (1).txt` as "a".
    """
    matches = list(_PARAMETER.finditer(header))
    found = {match[1].lower(): match[2].rstrip(" \t") for match in matches}
    if len(found) < len(matches) or any(match[3].strip(" \t") for match in matches):
        raise MalformedMultipart
    return header.partition(";")[0].strip(" \t").lower(), {
        # An extended value, such as that of `filename*`, cannot be quoted (RFC 8187).
        name: value if name.endswith("*") else header_unquote(value)
        for name, value in found.items()
    }


def _filename(parameters: dict[str, str]) -> str:
    """Return the name to show for a file. Raises InvalidForm without a name, or with a bad one.

    RFC 7578, section 4.2, allows only `filename`, in UTF-8, and forbids `filename*`. But .NET sends
    both, and its `filename` is an encoded-word, so `filename*` comes first. urllib3 before 2.0
    sends `filename*` alone.
    """
    extended, plain = (
        parameters.get(name, "").encode("latin-1") for name in ("filename*", "filename")
    )
    if not extended and not plain:
        raise InvalidForm(f"/{FIELD}", "no file was chosen")
    # Browsers send `"` as %22 (WHATWG HTML, section 4.10.21.8). They also send CR as %0D and LF as
    # %0A, which stay as they are, because a name with a line break would be refused.
    given = [extended_value(extended), _text(plain).replace("%22", '"')]
    try:
        return display_name(*(name for name in given if name is not None))
    except ValueError as error:
        raise InvalidForm(f"/{FIELD}", str(error)) from None


def _text(name: bytes) -> str:
    """Decode a name. Lone surrogates stay, so that they are refused; other bytes become U+FFFD."""
    try:
        return name.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        return name.decode("utf-8", "replace")


def _declared_type(header: str) -> str:
    """Return the media type of a Content-Type header, or application/octet-stream."""
    try:
        media_type, parameters = _parsed(header)
    except MalformedMultipart:
        return "application/octet-stream"
    if not _MEDIA_TYPE.fullmatch(media_type):
        return "application/octet-stream"
    return with_charset(media_type, parameters.get("charset", ""))


class NotMultipart(Exception):
    """The body is not multipart/form-data with a valid boundary."""

    def __init__(self) -> None:
        super().__init__(self.__doc__)


class MalformedMultipart(Exception):
    """The multipart body is malformed, or ends too early."""

    def __init__(self) -> None:
        super().__init__(self.__doc__)


class InvalidForm(Exception):
    """The form is well-formed, but this service does not accept it.

    Args:
        pointer: a JSON pointer (RFC 6901) to the field, or "" for the whole form.
        detail: the error, which does not repeat the value.
    """

    def __init__(self, pointer: str, detail: str) -> None:
        super().__init__(pointer, detail)
        self.pointer = pointer
        self.detail = detail
