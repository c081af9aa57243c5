"""Reads the one file of a multipart/form-data body (RFC 7578) while the body arrives."""

import re
from collections.abc import AsyncIterator
from dataclasses import dataclass

from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import MultipartParser, parse_options_header

from app.uploads.names import display_name, extended_value, with_charset
from app.uploads.transfer_encoding import ENCODED_AT_MOST, Decoder, decoded, decoder_for

FIELD = "file"

OVERHEAD_BYTES = 64 * 1024  # of a form around its file: more than all headers and boundaries need
MAX_HEADERS = 8  # of a part
MAX_HEADER_BYTES = 4096
# Bytes before the first part, after the last part, or of padding after a boundary.
MAX_AROUND = 4096
# Lines that begin like a delimiter and are none, such as `--Xy` with the boundary `X`. RFC 2046,
# section 5.1.1, forbids them. Each costs the parser as much time as a kilobyte of other content.
MAX_LOOKALIKES = 1000

# RFC 2046, section 5.1.1. No boundary contains a CR; `_may_be_split` relies on it.
_BOUNDARY = re.compile(rb"[0-9A-Za-z'()+_,./:=? -]{0,69}[0-9A-Za-z'()+_,./:=?-]")

# Finds `filename*` in a Content-Disposition header. The first alternative skips quoted strings.
_EXTENDED_FILENAME = re.compile(
    rb'"(?:[^"\\]|\\.)*+"?|;[ \t]*filename\*[ \t]*=[ \t]*([^;]*)', re.IGNORECASE | re.DOTALL
)

# RFC 6838, section 4.2.
_NAME = rb"[0-9a-z][0-9a-z!#$&^_.+-]{0,126}"
_MEDIA_TYPE = re.compile(_NAME + rb"/" + _NAME)


def largest_form(size: int) -> int:
    """Return the largest size in bytes of a form with a file of `size` bytes, in any encoding."""
    return ENCODED_AT_MOST * size + OVERHEAD_BYTES


async def file_part(
    content_type: str, body: AsyncIterator[bytes]
) -> tuple["PartInfo", AsyncIterator[bytes]]:
    """Read a form up to its file. Return a description of the file and an iterator over its bytes.

    The form must have one part, named `file`, and no other. The iterator decodes a
    Content-Transfer-Encoding (RFC 7578, section 4.7). It also reads the rest of the form after the
    file, and raises if that is malformed. So the caller must discard the file unless the iterator
    ends without an error.

    Args:
        content_type: the request's Content-Type header.
        body: the chunks of the request's body as they arrive.

    This function and the iterator raise NotMultipart, MalformedMultipart, InvalidForm,
    UnknownEncoding and MalformedEncoding.
    """
    form = _Form(_boundary(content_type))
    # 1. Parse chunks until the headers of the file are complete. The last of these chunks may
    # contain the first bytes of the file; the parser keeps them for step 2.
    async for chunk in body:
        form.feed(chunk)
        if form.file is not None:
            # 2. Let the caller read the rest, one chunk at a time.
            content = _content(form, body)
            if form.decoder is not None:
                content = decoded(content, form.decoder)
            return form.file, content
    form.check_complete()
    raise InvalidForm(f"/{FIELD}", "this field is required")


async def _content(form: "_Form", body: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Yield the bytes of the file, then check that the form is complete."""
    for piece in form.take_pieces():
        yield piece
    async for chunk in body:
        form.feed(chunk)
        for piece in form.take_pieces():
            yield piece
    form.check_complete()


def _boundary(content_type: str) -> bytes:
    """Return the boundary that a Content-Type header names. Raises NotMultipart."""
    if not content_type.isascii():
        raise NotMultipart
    media_type, options = parse_options_header(content_type)
    boundary = options.get(b"boundary", b"")
    if media_type != b"multipart/form-data" or not _BOUNDARY.fullmatch(boundary):
        raise NotMultipart
    return boundary


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


class _Form:
    """Parses a form chunk by chunk, and checks it.

    For example, with the boundary `X` and one file of 5 bytes, a form looks like this:

        --X
        Content-Disposition: form-data; name="file"; filename="a.txt"
        Content-Type: text/plain

        Hello
        --X--

    The parser of python-multipart calls the methods below for each of its parts. It searches every
    byte for the delimiter, here `CR LF --X`. A large file consists almost only of chunks without
    one, and those do not go through the parser; see `feed`.

    Args:
        boundary: the separator of the form's parts.
    """

    def __init__(self, boundary: bytes) -> None:
        self.file: PartInfo | None = None
        self.decoder: Decoder | None = None
        self._pieces: list[bytes] = []  # of the file, until the caller takes them
        self._headers: dict[bytes, bytes] = {}  # of the part
        self._name = self._value = b""  # of the header that is being parsed
        self._begun = False  # whether the first part has begun
        self._ended = False  # whether the closing delimiter has arrived
        # Whether the parser is within the content of the file and has not kept back the last bytes
        # of a chunk, which could be the beginning of a delimiter.
        self._within_content = False
        self._around = 0  # bytes of padding since the last content; see MAX_AROUND
        self._lookalikes = 0  # lines that begin with the delimiter; real delimiters count too
        self._delimiter = b"\r\n--" + boundary
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._begin_part,
                "on_header_field": self._add_to_header_name,
                "on_header_value": self._add_to_header_value,
                "on_header_end": self._end_header,
                "on_headers_finished": self._end_headers,
                "on_part_data": self._add_piece,
                "on_end": self._end_form,
            },
            max_header_count=MAX_HEADERS,
            max_header_size=MAX_HEADER_BYTES,
        )

    def feed(self, chunk: bytes) -> None:
        """Parse the next chunk of the body.

        For example, a file of 10 MiB arrives in chunks of 64 KiB. The first chunk has the headers
        and goes through the parser, and so does the last one with the final delimiter. Every chunk
        between them is searched once for the delimiter, by `bytes.count`, and is content.

        Raises MalformedMultipart, InvalidForm or UnknownEncoding.
        """
        had_file, had_ended = self.file is not None, self._ended
        # 1. Count delimiters and lines that look like one, and refuse too many.
        found = chunk.count(self._delimiter)
        self._lookalikes += found
        if self._lookalikes > MAX_LOOKALIKES:
            raise MalformedMultipart
        # 2. If the chunk can only be content, take it as it is. Otherwise, parse it.
        is_plain = not found and not self._may_be_split(chunk)
        if is_plain and self._within_content:
            self._pieces.append(chunk)
        else:
            self._parse(chunk)
            self._within_content = is_plain and bool(self._pieces)
        # 3. Count bytes around the content, and refuse too many. A form may be four times as large
        # as the largest file (see `largest_form`), and all of it could be padding.
        if had_ended or not self._begun or (had_file and not self._pieces):
            self._around += len(chunk)
            if self._around > MAX_AROUND:
                raise MalformedMultipart
        elif had_file:
            self._around = 0

    def take_pieces(self) -> list[bytes]:
        """Return the pieces of the file that were found since the last call."""
        pieces, self._pieces = self._pieces, []
        return pieces

    def check_complete(self) -> None:
        """Raise MalformedMultipart unless the closing delimiter has arrived."""
        if not self._ended:
            raise MalformedMultipart

    def _may_be_split(self, chunk: bytes) -> bool:
        """Return whether a delimiter may begin at the end of this chunk and end in the next.

        For example, with the delimiter `CR LF --X`, a chunk may end with `CR LF -`. A delimiter has
        a CR only at its start, so only the last CR of the chunk counts.
        """
        start = chunk.rfind(b"\r", -len(self._delimiter))
        return start >= 0 and self._delimiter.startswith(chunk[start:])

    def _parse(self, chunk: bytes) -> None:
        try:
            self._parser.write(chunk)
        except MultipartParseError as error:
            raise MalformedMultipart from error

    def _begin_part(self) -> None:
        self._begun, self._around = True, 0
        self._headers = {}

    def _add_to_header_name(self, data: bytes, start: int, end: int) -> None:
        self._name += data[start:end]

    def _add_to_header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _end_header(self) -> None:
        name, value = self._name.lower(), self._value
        self._name = self._value = b""
        # Of two headers with the same name, some programs use the first and some the last.
        if name in self._headers:
            raise MalformedMultipart
        self._headers[name] = value

    def _end_headers(self) -> None:
        """Check the headers of a part, which must be the one file."""
        header = self._headers.get(b"content-disposition", b"")
        disposition, options = parse_options_header(header)
        if disposition != b"form-data" or b"name" not in options:
            raise MalformedMultipart
        if options[b"name"] != FIELD.encode():
            raise InvalidForm("", f"the form takes the field '{FIELD}' and no other")
        if self.file is not None:
            raise InvalidForm(f"/{FIELD}", "only one file can be uploaded at a time")
        self.decoder = decoder_for(self._headers)
        self.file = PartInfo(
            _filename(header, options.get(b"filename", b"")),
            _declared_type(self._headers.get(b"content-type", b"")),
            is_encoded=self.decoder is not None,
        )

    def _add_piece(self, data: bytes, start: int, end: int) -> None:
        self._pieces.append(data[start:end])

    def _end_form(self) -> None:
        self._ended = True


def _filename(header: bytes, plain: bytes) -> str:
    """Return the name to show for a file. Raises InvalidForm without a name, or with a bad one.

    RFC 7578, section 4.2, allows only `filename`, in UTF-8, and forbids `filename*`. But .NET sends
    both, and its `filename` is an encoded-word, so `filename*` comes first. urllib3 before 2.0
    sends `filename*` alone.
    """
    extended = [match[1].strip() for match in _EXTENDED_FILENAME.finditer(header) if match[1]]
    if not plain and not extended:
        raise InvalidForm(f"/{FIELD}", "no file was chosen")
    given = [*map(extended_value, extended), _text(plain)]
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


def _declared_type(header: bytes) -> str:
    """Return the media type of a Content-Type header, or application/octet-stream."""
    media_type, options = parse_options_header(header)
    media_type = media_type.lower()
    if not _MEDIA_TYPE.fullmatch(media_type):
        return "application/octet-stream"
    return with_charset(media_type.decode(), options.get(b"charset", b"").decode("latin-1"))


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
