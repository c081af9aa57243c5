"""Decides the name and the media type of a file. What the client says about them may be wrong."""

import re
import unicodedata
from pathlib import PurePosixPath
from urllib.parse import quote, unquote_to_bytes

LONGEST_NAME = 255  # characters
FALLBACK = "upload"

# Control characters, line breaks and lone surrogates. They could begin another header or log line,
# or control a terminal. Browsers escape them, so a name with one is an attack or a mistake.
_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")

# Embeddings, overrides and isolates change the order in which characters are displayed, so that a
# program looks like a picture (Unicode TR 36, section 3.1). An encoded-word (RFC 2047) could be
# decoded once more, to anything.
_MISLEADING = re.compile(r"[\u202a-\u202e\u2066-\u2069]|=\?.*\?=")

_EXTENSION = re.compile(r"\.[0-9A-Za-z]{1,10}")

# RFC 8187, section 3.2.1, and ISO-8859-1 from RFC 5987, its predecessor.
_EXTENDED = re.compile(
    rb"(utf-8|iso-8859-1)'[0-9A-Za-z-]*'((?:%[0-9A-Fa-f]{2}|[0-9A-Za-z!#$&+.^_`|~-])*)",
    re.IGNORECASE,
)

# Characters that are not safe in a quoted string (RFC 6266, appendix D): many programs do not undo
# its escapes, and some decode "%41".
_NOT_IN_QUOTES = re.compile(r'[^ -~]|["/\\]|%(?=[0-9A-Fa-f]{2})')

# A token (RFC 9110, section 8.3.2) of at most 40 characters (RFC 2978, section 2.3).
_CHARSET = re.compile(r"[0-9A-Za-z!#$%&'*+.^_`|~-]{1,40}")
_WIDE_CHARSET = re.compile(r"(?:utf-?(?:16|32)|ucs-?[24]|iso-10646-ucs-[24]).*", re.IGNORECASE)
_WIDE_MARKS = (b"\xff\xfe", b"\xfe\xff", b"\0\0\xfe\xff")  # byte order marks of UTF-16 and UTF-32

# Signatures that puremagic's list has for several types: `PK` also begins half a dozen office
# formats. The general type is used.
_GENERAL_TYPES = {b"PK\x03\x04": "application/zip", b"%PDF-": "application/pdf"}

# Shorter signatures match by chance: "BM" begins a bitmap, and also a text about BMW.
_SHORTEST_SIGNATURE = 4  # bytes
_SHORTEST_BINARY_SIGNATURE = 3  # bytes, if not all are ASCII; a JPEG has three

_TEXT = re.compile(
    r"text/.+|application/(?:(?:.+\+)?json|javascript|(?:.+\+)?xml|yaml|toml|sql|x-ndjson)"
)


def display_name(*given: str) -> str:
    r"""Return the name to show for a file.

    `given` has one or more names from the client, the best first. The result is the last path
    component of the first name that is safe to show: "C:\a\b.txt" becomes "b.txt". If no name is
    safe, the result is "upload" with the extension of the first name, if the extension is plain.
    Pages, mails and Content-Disposition headers contain the name. No file on disk has it.

    A name is not safe to show if it is empty, or if it has:

    - more than `LONGEST_NAME` characters,
    - an encoded-word (RFC 2047),
    - a character that changes the direction of the text (Unicode TR 36, section 3.1),
    - U+FFFD, which replaces bytes that are not UTF-8.

    Raises ValueError if a name has control characters or lone surrogates. The message does not
    repeat the name.
    """
    if any(map(_CONTROLS.search, given)):
        raise ValueError("the file name contains control characters, or is not valid Unicode")
    names = [re.split(r"[/\\]", name)[-1].strip(" ") for name in given]
    return next(filter(_is_safe_to_show, names), None) or _fallback(names[0])


def _is_safe_to_show(name: str) -> bool:
    return (
        len(name) <= LONGEST_NAME
        and bool(name.strip(". "))
        and "\ufffd" not in name
        and not _MISLEADING.search(name)
    )


def _fallback(name: str) -> str:
    """Return "upload" with the extension of a name, such as "upload.png", if it is plain."""
    extension = PurePosixPath(name).suffix
    return FALLBACK + (extension if _EXTENSION.fullmatch(extension) else "")


def extended_value(raw: bytes) -> str | None:
    """Decode the value of a parameter such as `filename*` (RFC 8187).

    For example, `UTF-8''na%C3%AFve.txt` becomes "naïve.txt". Returns None if the value is
    malformed, or its charset is neither UTF-8 nor ISO-8859-1.
    """
    match = _EXTENDED.fullmatch(raw)
    if match is None:
        return None
    try:
        return unquote_to_bytes(match[2]).decode(match[1].decode())
    except UnicodeDecodeError:
        return None


def as_attachment(name: str) -> str:
    """Return the Content-Disposition header with which a browser saves a file under this name.

    The header has the name twice (RFC 6266, section 4.3). `filename*` is exact. `filename`, in
    ASCII, is for programs that do not know `filename*`, such as curl -OJ.
    """
    exact = quote(name, safe="")
    return f"attachment; filename=\"{ascii_name(name)}\"; filename*=UTF-8''{exact}"


def ascii_name(name: str) -> str:
    """Return a name in ASCII, such as "naive.txt" for "naïve.txt".

    It needs no escape in a quoted string, and it is not a path.
    """
    letters = "".join(
        letter for letter in unicodedata.normalize("NFD", name) if not unicodedata.combining(letter)
    )
    plain = _NOT_IN_QUOTES.sub("_", letters)
    return plain if PurePosixPath(plain).stem.strip("_. ") else _fallback(plain)


def with_charset(kind: str, charset: str) -> str:
    """Return a media type with its charset, if it is a text type and the charset is a token."""
    if _TEXT.fullmatch(kind) and _CHARSET.fullmatch(charset):
        return f"{kind}; charset={charset}"
    return kind


def media_type(head: bytes, declared: str) -> str:
    """Return the media type of a file.

    `head` has the first bytes of the file, and `declared` is the client's Content-Type. Text keeps
    its declared charset; no charset is added.
    """
    kind, _, charset = declared.partition("; charset=")
    # 1. A signature decides, whatever the client declared.
    if by_signature := _type_by_signature(head):
        return with_charset(by_signature, charset)
    # 2. Text has no signature, so a declared text type is accepted, unless the bytes contain a NUL.
    # Of today's encodings only UTF-16 and UTF-32 have NUL bytes in text.
    wide = head.startswith(_WIDE_MARKS) or _WIDE_CHARSET.fullmatch(charset)
    if _TEXT.fullmatch(kind) and (wide or b"\0" not in head):
        return declared
    # 3. Everything else could be anything.
    return "application/octet-stream"


def _type_by_signature(head: bytes) -> str | None:
    """Return the type whose signature begins the file, or None if the signature is ambiguous."""
    # Imported here, because the import reads a table of 1,400 signatures.
    from puremagic import PureError, magic_string

    # 1. Signatures of several types.
    for signature, general_type in _GENERAL_TYPES.items():
        if head.startswith(signature):
            return general_type
    # 2. All signatures that match. Leave out those with a negative offset: it counts from the end
    # of the file, and only the beginning is known here.
    try:
        matches = magic_string(head)
    except (PureError, ValueError):
        return None
    matches = [match for match in matches if match.offset >= 0]
    # 3. The longest decide, if they are long enough and all have the same type.
    longest = max((len(match.byte_match) for match in matches), default=0)
    best = [match for match in matches if len(match.byte_match) == longest]
    if not all(_is_long_enough(match.byte_match) for match in best):
        return None
    types = {match.mime_type for match in best}
    return types.pop() or None if len(types) == 1 else None


def _is_long_enough(signature: bytes) -> bool:
    shortest = _SHORTEST_SIGNATURE if signature.isascii() else _SHORTEST_BINARY_SIGNATURE
    return len(signature) >= shortest
