"""What a stranger's file is called and what it is, as far as either can be believed."""

import re

LONGEST_NAME = 255  # characters

# What could mislead a reader or break a header, and how to say so without repeating it.
_REFUSED = {
    "contains control characters": re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]"),
    "changes the direction of text": re.compile(r"[\u202a-\u202e\u2066-\u2069]"),
    "is not valid Unicode": re.compile(r"[\ud800-\udfff]"),
    "contains an encoded-word": re.compile(r"=\?.*\?="),
}

# The first bytes of these kinds are also those of others in puremagic's list: a zip archive is
# half a dozen office formats there.
_SETTLED = {b"PK\x03\x04": "application/zip", b"%PDF-": "application/pdf"}

# Shorter ones match by chance: "BM" begins bitmaps, and sentences about them.
_TELLING = 4  # bytes
_TELLING_BINARY = 3  # bytes, if they are not all ASCII: a JPEG has no more

_TEXT = re.compile(
    r"text/.+|application/(?:(?:.+\+)?json|javascript|(?:.+\+)?xml|yaml|toml|sql|x-ndjson)"
)


def display_name(raw: str) -> str:
    """The name to show for a file: the last component of what its sender called it.

    It goes into pages, mails and Content-Disposition headers, and never to the disk. Raises
    ValueError, whose message does not repeat it, for a name with control characters, overrides of
    the text's direction (Unicode TR 36, section 3.1), lone surrogates or encoded-words (RFC 2047),
    or with more than `LONGEST_NAME` characters.
    """
    name = re.split(r"[/\\]", raw)[-1].strip(" ")
    if len(name) > LONGEST_NAME:
        raise ValueError(f"the file name is longer than {LONGEST_NAME} characters")
    for problem, pattern in _REFUSED.items():
        if pattern.search(name):
            raise ValueError(f"the file name {problem}")
    return name if name.strip(". ") else "upload"


def media_type(head: bytes, declared: str) -> str:
    """The media type of a file, from its first bytes and from what its sender declared.

    The bytes decide. A declared type counts only where nothing in the bytes could confirm it,
    which is where they are text. Otherwise the answer is application/octet-stream.
    """
    magic = _magic(head)
    if magic:
        return magic
    # A NUL is in no text of today's encodings but UTF-16, which announces itself by its bytes.
    if _TEXT.fullmatch(declared) and b"\0" not in head:
        return declared
    return "application/octet-stream"


def _magic(head: bytes) -> str | None:
    """The type that the first bytes give away, if they leave no doubt."""
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
