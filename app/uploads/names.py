"""Decides the name and the media type of an uploaded file from what its sender says of it."""

import re
import unicodedata
from pathlib import PurePosixPath
from urllib.parse import quote, unquote_to_bytes

LONGEST_NAME = 255  # characters
FALLBACK = "upload"

# In a header or a log line these would begin another one, or command a terminal. The senders of
# file names escape them, so a name that has one is an attack or a mistake.
_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")

# Embeddings, overrides and isolates change the order in which a name is displayed: "exe.gpj" for a
# program (Unicode TR 36, section 3.1). An encoded-word (RFC 2047) could be decoded once more.
_MISLEADING = re.compile(r"[\u202a-\u202e\u2066-\u2069]|=\?.*\?=")

_EXTENSION = re.compile(r"\.[0-9A-Za-z]{1,10}")

# RFC 8187, section 3.2.1. RFC 5987, which it replaces, had ISO-8859-1 as well.
_EXTENDED = re.compile(
    rb"(utf-8|iso-8859-1)'[0-9A-Za-z-]*'((?:%[0-9A-Fa-f]{2}|[0-9A-Za-z!#$&+.^_`|~-])*)",
    re.IGNORECASE,
)

# RFC 6266, appendix D: many programs do not undo escapes in a quoted string, and some decode "%41".
_NOT_IN_QUOTES = re.compile(r'[^ -~]|["/\\]|%(?=[0-9A-Fa-f]{2})')

# A token (RFC 9110, section 8.3.2), of as many characters as the name of a charset may have (RFC
# 2978, section 2.3).
_CHARSET = re.compile(r"[0-9A-Za-z!#$%&'*+.^_`|~-]{1,40}")
_WIDE_CHARSET = re.compile(r"(?:utf-?(?:16|32)|ucs-?[24]|iso-10646-ucs-[24]).*", re.IGNORECASE)
_WIDE_MARKS = (b"\xff\xfe", b"\xfe\xff", b"\0\0\xfe\xff")  # byte order marks of UTF-16 and UTF-32

# The first bytes of these kinds are also those of others in puremagic's list: a zip archive is
# half a dozen office formats there.
_SETTLED = {b"PK\x03\x04": "application/zip", b"%PDF-": "application/pdf"}

# Shorter ones match by chance: "BM" begins bitmaps, and sentences about them.
_TELLING = 4  # bytes
_TELLING_BINARY = 3  # bytes, if they are not all ASCII: a JPEG has no more

_TEXT = re.compile(
    r"text/.+|application/(?:(?:.+\+)?json|javascript|(?:.+\+)?xml|yaml|toml|sql|x-ndjson)"
)


def display_name(*given: str) -> str:
    """Returns the name to show for a file, made of the names that its sender gives, best first.

    It is the last component of the first of them that can be shown. If none can, it is "upload",
    with the extension of the first if that is harmless. The name goes into pages, mails and
    Content-Disposition headers, and never to the disk.

    A name cannot be shown if it has more than `LONGEST_NAME` characters, an encoded-word (RFC
    2047), a control of the text's direction (Unicode TR 36, section 3.1) or U+FFFD, which stands
    for bytes that are not UTF-8; or if nothing of it is left. Raises ValueError, whose message does
    not repeat the name, if one of them has control characters or lone surrogates.
    """
    if any(map(_CONTROLS.search, given)):
        raise ValueError("the file name contains control characters, or is not valid Unicode")
    names = [re.split(r"[/\\]", name)[-1].strip(" ") for name in given]
    return next(filter(_can_be_shown, names), None) or _fallback(names[0])


def _can_be_shown(name: str) -> bool:
    return (
        len(name) <= LONGEST_NAME
        and bool(name.strip(". "))
        and "\ufffd" not in name
        and not _MISLEADING.search(name)
    )


def _fallback(name: str) -> str:
    extension = PurePosixPath(name).suffix
    return FALLBACK + (extension if _EXTENSION.fullmatch(extension) else "")


def extended_value(raw: bytes) -> str | None:
    """Decodes the value of a parameter such as `filename*` (RFC 8187): `UTF-8''na%C3%AFve.txt`.

    Returns None if it is malformed, or in another charset than UTF-8 and ISO-8859-1.
    """
    match = _EXTENDED.fullmatch(raw)
    if match is None:
        return None
    try:
        return unquote_to_bytes(match[2]).decode(match[1].decode())
    except UnicodeDecodeError:
        return None


def as_attachment(name: str) -> str:
    """Returns a Content-Disposition with which a browser saves a file under this name.

    The name is given twice (RFC 6266, section 4.3): `filename*` is exact; `filename`, in ASCII, is
    for programs that know nothing else, such as curl -OJ.
    """
    exact = quote(name, safe="")
    return f"attachment; filename=\"{ascii_name(name)}\"; filename*=UTF-8''{exact}"


def ascii_name(name: str) -> str:
    """Returns a name for programs that know only ASCII: "naive.txt" for "naïve.txt".

    It needs no escape in a quoted string, and it is no path.
    """
    letters = "".join(
        letter for letter in unicodedata.normalize("NFD", name) if not unicodedata.combining(letter)
    )
    plain = _NOT_IN_QUOTES.sub("_", letters)
    return plain if PurePosixPath(plain).stem.strip("_. ") else _fallback(plain)


def with_charset(kind: str, charset: str) -> str:
    """Adds a charset to a media type, if the type is a kind of text and the charset is a token."""
    if _TEXT.fullmatch(kind) and _CHARSET.fullmatch(charset):
        return f"{kind}; charset={charset}"
    return kind


def media_type(head: bytes, declared: str) -> str:
    """Returns the media type of a file, from its first bytes and from what its sender declared.

    The bytes decide. A declared type counts only where nothing in the bytes could confirm it,
    which is where they are text. Otherwise the answer is application/octet-stream. Text keeps the
    charset that was declared, and is given none that was not.
    """
    kind, _, charset = declared.partition("; charset=")
    if magic := _magic(head):
        return with_charset(magic, charset)
    # A NUL is in no text of today's encodings but UTF-16 and UTF-32.
    wide = head.startswith(_WIDE_MARKS) or _WIDE_CHARSET.fullmatch(charset)
    if _TEXT.fullmatch(kind) and (wide or b"\0" not in head):
        return declared
    return "application/octet-stream"


def _magic(head: bytes) -> str | None:
    """Returns the type that the first bytes give away, if they leave no doubt."""
    # Reads its table of 1,400 signatures when it is imported.
    from puremagic import PureError, magic_string

    for beginning, settled in _SETTLED.items():
        if head.startswith(beginning):
            return settled
    try:
        matches = magic_string(head)
    except (PureError, ValueError):
        return None
    # Negative offsets count from the end of the file, and here the end is not known.
    matches = [match for match in matches if match.offset >= 0]
    longest = max((len(match.byte_match) for match in matches), default=0)
    best = [match for match in matches if len(match.byte_match) == longest]
    if not all(_telling(match.byte_match) for match in best):
        return None
    types = {match.mime_type for match in best}
    return types.pop() or None if len(types) == 1 else None


def _telling(beginning: bytes) -> bool:
    return len(beginning) >= (_TELLING if beginning.isascii() else _TELLING_BINARY)
