"""Decoding of base64 and quoted-printable files while they arrive."""

import base64
import quopri

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.uploads.transfer_encoding import (
    LONGEST_BLANKS,
    MalformedEncoding,
    UnknownEncoding,
    decoder_for,
)

EVERYTHING = bytes(range(256)) * 3


def decode(name: str, *pieces: bytes) -> bytes:
    decoder = decoder_for({"content-transfer-encoding": name})
    assert decoder is not None
    return b"".join([decoder.feed(piece) for piece in pieces]) + decoder.finish()


def cut(text: bytes, size: int) -> list[bytes]:
    return [text[start : start + size] for start in range(0, len(text), size)]


@pytest.mark.parametrize("name", ["", "7bit", "8bit", "binary", " BINARY "])
def test_an_identity_encoding_needs_no_decoder(name: str) -> None:
    assert decoder_for({"content-transfer-encoding": name}) is None
    assert decoder_for({}) is None
    assert decoder_for({"content-encoding": "Identity"}) is None


@pytest.mark.parametrize(
    "headers",
    [
        {"content-transfer-encoding": "x-uuencode"},
        {"content-transfer-encoding": "gzip"},
        {"content-transfer-encoding": "base64; x=y"},
        {"content-encoding": "gzip"},
    ],
)
def test_a_file_in_another_encoding_is_refused(headers: dict[str, str]) -> None:
    with pytest.raises(UnknownEncoding, match="base64 or quoted-printable"):
        decoder_for(headers)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 77, 10_000])
@pytest.mark.parametrize("encode", [base64.b64encode, base64.encodebytes])
def test_base64_is_decoded_from_chunks_of_any_size(encode: object, size: int) -> None:
    assert callable(encode)
    assert decode("Base64", *cut(encode(EVERYTHING), size)) == EVERYTHING


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 77, 10_000])
def test_quoted_printable_is_decoded_from_chunks_of_any_size(size: int) -> None:
    encoded = quopri.encodestring(EVERYTHING, quotetabs=True)
    assert decode("Quoted-Printable", *cut(encoded, size)) == EVERYTHING


@given(content=st.binary(), sizes=st.integers(1, 9))
def test_any_content_survives_both_encodings(content: bytes, sizes: int) -> None:
    assert decode("base64", *cut(base64.b64encode(content), sizes)) == content
    lines = content.replace(b"\n", b"\r\n")
    encoded = b"".join(b"=%02x" % byte for byte in content)
    assert decode("quoted-printable", *cut(encoded, sizes)) == content
    # `quopri` leaves each LF as it is, because it takes it for the end of a line.
    assert decode("quoted-printable", *cut(quopri.encodestring(lines), sizes)) == lines


@pytest.mark.parametrize(
    ("encoded", "content"),
    [
        (b"a =  \r\nb", b"a b"),
        (b"a=\nb", b"ab"),
        (b"a  \t\r\nb \nc \t", b"a\r\nb\nc"),
        (b"a=3db", b"a=b"),
        (b"a b=20=\r\n", b"a b "),
        (b"the boundary's line end follows=", b"the boundary's line end follows"),
        (b"= ", b""),
        (b"na\xefve", b"na\xefve"),
        (b"a\rb\r", b"a\rb\r"),
    ],
)
def test_soft_line_breaks_and_trailing_blanks_are_not_content(
    encoded: bytes, content: bytes
) -> None:
    for size in range(1, len(encoded) + 1):
        assert decode("quoted-printable", *cut(encoded, size)) == content


@pytest.mark.parametrize(
    ("name", "encoded"),
    [
        ("base64", b"AAAA="),
        ("base64", b"AAA"),
        ("base64", b"A"),
        ("base64", b"AA==AAAA"),
        ("base64", b"AA==AA=="),
        ("base64", b"=AAA"),
        ("base64", b"AA=A"),
        ("base64", b"AA-_"),
        ("base64", b"Hello, world"),
        ("base64", b"AAAA\0AAA"),
        ("quoted-printable", b"a=b"),
        ("quoted-printable", b"a=4"),
        ("quoted-printable", b"a==20"),
        ("quoted-printable", b"a=\rb"),
        ("quoted-printable", b"a=\r"),
        ("quoted-printable", b"a= b"),
        ("quoted-printable", b"a=" + b" " * (LONGEST_BLANKS + 1)),
    ],
)
def test_input_that_breaks_its_declared_encoding_is_malformed(name: str, encoded: bytes) -> None:
    for size in (1, 2, 3, len(encoded)):
        with pytest.raises(MalformedEncoding):
            decode(name, *cut(encoded, size))


def test_too_many_trailing_blanks_are_refused() -> None:
    with pytest.raises(MalformedEncoding):
        decode("quoted-printable", *[b" " * 100] * (LONGEST_BLANKS // 100 + 1))
