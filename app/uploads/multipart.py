"""Reads the one file of a multipart/form-data body (RFC 7578) while the body still arrives."""

import re
from collections.abc import AsyncIterator
from dataclasses import dataclass

from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import MultipartParser, parse_options_header

from app.uploads.names import display_name, extended_value, with_charset
from app.uploads.transfer_encoding import ENCODED_AT_MOST, Decoder, decoded, decoder_for

FIELD = "file"

OVERHEAD_BYTES = 64 * 1024  # more than the part's headers and the boundaries around a file
MAX_HEADERS = 8  # of a part
MAX_HEADER_BYTES = 4096
MAX_AROUND = 4096  # bytes before the first part, of padding after a boundary, after the last part
# Lines that begin with the boundary and are no delimiter. RFC 2046, section 5.1.1, allows none; a
# few do no harm, but each costs the parser as much as a kilobyte of anything else.
MAX_LOOKALIKES = 1000

# RFC 2046, section 5.1.1. It is relied on that a delimiter has no CR but its first byte.
_BOUNDARY = re.compile(rb"[0-9A-Za-z'()+_,./:=? -]{0,69}[0-9A-Za-z'()+_,./:=?-]")

# `filename*` in a Content-Disposition header. What stands in quotes is passed over.
_EXTENDED_FILENAME = re.compile(
    rb'"(?:[^"\\]|\\.)*+"?|;[ \t]*filename\*[ \t]*=[ \t]*([^;]*)', re.IGNORECASE | re.DOTALL
)

# RFC 6838, section 4.2.
_NAME = rb"[0-9a-z][0-9a-z!#$&^_.+-]{0,126}"
_MEDIA_TYPE = re.compile(_NAME + rb"/" + _NAME)


def largest_form(size: int) -> int:
    """Returns how many bytes a form has at most whose file has `size`, however it is encoded."""
    return ENCODED_AT_MOST * size + OVERHEAD_BYTES


async def file_part(
    content_type: str, body: AsyncIterator[bytes]
) -> tuple["PartInfo", AsyncIterator[bytes]]:
    """Reads a form up to its file; returns what the file is, and an iterator over its bytes.

    `content_type` is the request's header, `body` the chunks of its body as they arrive. The
    form has one part, named `file`, and nothing else. The iterator decodes a
    Content-Transfer-Encoding (RFC 7578, section 4.7). It also reads what follows the file, and
    raises for it in the end: nothing may be kept before it is exhausted.

    Raises, from here or from the iterator, NotMultipart, MalformedMultipart, InvalidForm,
    UnknownEncoding and MalformedEncoding.
    """
    form = _Form(_boundary(content_type))
    async for chunk in body:
        form.feed(chunk)
        if form.file is not None:
            content = _content(form, body)
            if form.decoder is not None:
                content = decoded(content, form.decoder)
            return form.file, content
    form.check_complete()
    raise InvalidForm(f"/{FIELD}", "this field is required")


async def _content(form: "_Form", body: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    for piece in form.take():
        yield piece
    async for chunk in body:
        form.feed(chunk)
        for piece in form.take():
            yield piece
    form.check_complete()


def _boundary(content_type: str) -> bytes:
    if not content_type.isascii():
        raise NotMultipart
    media_type, options = parse_options_header(content_type)
    boundary = options.get(b"boundary", b"")
    if media_type != b"multipart/form-data" or not _BOUNDARY.fullmatch(boundary):
        raise NotMultipart
    return boundary


@dataclass(frozen=True)
class PartInfo:
    """A file as its sender describes it.

    Args:
        filename: a name that is fit to be shown.
        content_type: a media type, with its charset if it is text; not yet compared to the bytes.
        is_encoded: whether the part has more bytes than the file.
    """

    filename: str
    content_type: str
    is_encoded: bool = False


class _Form:
    """The parser of a form, and what it has found so far.

    Args:
        boundary: the separator of the form's parts.
    """

    def __init__(self, boundary: bytes) -> None:
        self.file: PartInfo | None = None
        self.decoder: Decoder | None = None
        self._pieces: list[bytes] = []
        self._headers: dict[bytes, bytes] = {}
        self._name = self._value = b""
        self._begun = self._ended = False
        self._amid = False  # whether the parser is amid the content, and holds none of it back
        self._around = self._lookalikes = 0
        self._delimiter = b"\r\n--" + boundary
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._part_begins,
                "on_header_field": self._header_name,
                "on_header_value": self._header_value,
                "on_header_end": self._header_ends,
                "on_headers_finished": self._headers_end,
                "on_part_data": self._part_data,
                "on_end": self._form_ends,
            },
            max_header_count=MAX_HEADERS,
            max_header_size=MAX_HEADER_BYTES,
        )

    def feed(self, chunk: bytes) -> None:
        in_content, already_ended = self.file is not None, self._ended
        found = chunk.count(self._delimiter)
        self._lookalikes += found
        if self._lookalikes > MAX_LOOKALIKES:
            raise MalformedMultipart
        plain = not found and not self._is_torn(chunk)
        if plain and self._amid:
            self._pieces.append(chunk)  # as the parser would, once it had searched it again
        else:
            self._parse(chunk)
            self._amid = plain and bool(self._pieces)
        if already_ended or not self._begun or (in_content and not self._pieces):
            self._around += len(chunk)
            if self._around > MAX_AROUND:
                raise MalformedMultipart
        elif in_content:
            self._around = 0

    def take(self) -> list[bytes]:
        pieces, self._pieces = self._pieces, []
        return pieces

    def check_complete(self) -> None:
        if not self._ended:
            raise MalformedMultipart

    def _is_torn(self, chunk: bytes) -> bool:
        """Whether a delimiter may begin in a chunk and end in the next: at its last CR, if any."""
        start = chunk.rfind(b"\r", -len(self._delimiter))
        return start >= 0 and self._delimiter.startswith(chunk[start:])

    def _parse(self, chunk: bytes) -> None:
        try:
            self._parser.write(chunk)
        except MultipartParseError as error:
            raise MalformedMultipart from error

    def _part_begins(self) -> None:
        self._begun, self._around = True, 0
        self._headers = {}

    def _header_name(self, data: bytes, start: int, end: int) -> None:
        self._name += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _header_ends(self) -> None:
        name, value = self._name.lower(), self._value
        self._name = self._value = b""
        # Two that contradict each other would be read differently by different programs.
        if name in self._headers:
            raise MalformedMultipart
        self._headers[name] = value

    def _headers_end(self) -> None:
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

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        self._pieces.append(data[start:end])

    def _form_ends(self) -> None:
        self._ended = True


def _filename(header: bytes, plain: bytes) -> str:
    """Returns the name to show for a part's file.

    RFC 7578, section 4.2, has `filename` in UTF-8 and no `filename*`. But some clients send both,
    and then `filename*` is the one that is right: `filename` is an encoded-word (.NET). Others send
    it alone (urllib3 before 2.0).
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
    """Decodes a name; half of a surrogate pair stays one, and other bytes become U+FFFD."""
    try:
        return name.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        return name.decode("utf-8", "replace")


def _declared_type(header: bytes) -> str:
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
    """The form is well-formed, but not one this service takes.

    Args:
        pointer: the field (a JSON pointer, RFC 6901), or "" for the form as a whole.
        detail: what is wrong with it, without repeating it.
    """

    def __init__(self, pointer: str, detail: str) -> None:
        super().__init__(pointer, detail)
        self.pointer = pointer
        self.detail = detail
