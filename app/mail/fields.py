"""Header fields of mails as they are received: any bytes are read as far as possible."""

import re
from collections.abc import Iterator
from email.headerregistry import HeaderRegistry

MOST_HEAD = 32 * 1024  # bytes of a head, or of the head of a part, that are read for fields
LONGEST_FIELD = 2_000  # bytes of one field

_END_OF_HEAD = re.compile(rb"(?:\A|\n)\r?\n")
_FIELD = re.compile(rb"(?m)^([!-9;-~]+)[ \t]*:(.*(?:\n[ \t].*)*)")
_SURROGATE = re.compile("[\ud800-\udfff]")

# Parses every field as unstructured text, because the parsers of addresses and message ids raise
# many kinds of errors for a broken field.
_parse_unstructured = HeaderRegistry(use_default_map=False)


def fields(mail: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Find the names and values of the header fields in the first MOST_HEAD bytes."""
    end = _END_OF_HEAD.search(mail, 0, MOST_HEAD)
    head = mail[: end.start() if end else MOST_HEAD]
    return ((field[1], field[2]) for field in _FIELD.finditer(head))


def first_field(mail: bytes, wanted: bytes) -> str | None:
    """Return the first header field with this lower-case name as text, or None."""
    return next(
        (decoded_field(value) for name, value in fields(mail) if name.lower() == wanted), None
    )


def decoded_field(value: bytes) -> str:
    """Return the value of a header field as text, with encoded-words decoded (RFC 2047)."""
    return decode_words(unfolded(value))


def unfolded(value: bytes) -> str:
    """Return the value of a header field as one line of text, at most LONGEST_FIELD bytes of it."""
    text = value[:LONGEST_FIELD].decode("utf-8", "replace")
    return text.replace("\r\n", "").replace("\n", "").strip()


def decode_words(text: str) -> str:
    """Decode the encoded-words in a text (RFC 2047)."""
    if "=?" not in text:  # most fields; the parser would take ten times as long as the rest
        return text
    try:
        return without_surrogates(str(_parse_unstructured("subject", text)))
    except Exception:  # noqa: BLE001 -- a broken encoded-word raises any error of its codec
        return text


def without_surrogates(text: str) -> str:
    """Replace lone surrogates, because neither a page nor JSON can contain them."""
    return _SURROGATE.sub("\N{REPLACEMENT CHARACTER}", text)
