"""The display name and the media type of an uploaded file."""

import io
import re
import zipfile

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from app.uploads.names import LONGEST_NAME, ascii_name, display_name, media_type


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        ("report.pdf", "report.pdf"),
        ("../../etc/passwd", "passwd"),
        ("/etc/passwd", "passwd"),
        ("C:\\Users\\ada\\notes.txt", "notes.txt"),
        (" spaced name.txt ", "spaced name.txt"),
        (".bashrc", ".bashrc"),
        ("CON", "CON"),
        ("naïve 名前 🐍.txt", "naïve 名前 🐍.txt"),
        ("x" * LONGEST_NAME, "x" * LONGEST_NAME),
        ("", "upload"),
        (".", "upload"),
        ("..", "upload"),
        (". .", "upload"),
        ("folder/", "upload"),
    ],
)
def test_a_name_is_the_last_component_of_the_senders_path(raw: str, shown: str) -> None:
    assert display_name(raw) == shown


@pytest.mark.parametrize(
    "raw",
    [
        "secret\0.txt",
        "secret\r\nX-Evil: 1",
        "secret\n",
        "secret\x7f",
        "secret\x85",
        "secret\u2028",
        "secret\ud800",
    ],
)
def test_a_name_with_control_characters_is_refused_without_being_repeated(raw: str) -> None:
    for names in ([raw], [raw, "a.txt"], ["a.txt", raw]):
        with pytest.raises(ValueError, match=r"^the file name ") as refused:
            display_name(*names)
        assert "secret" not in str(refused.value)


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        ("a\u202egpj.exe", "upload.exe"),
        ("a\u2066b.txt", "upload.txt"),
        ("=?utf-8?q?a?=", "upload"),
        ("na\ufffdve.txt", "upload.txt"),
        ("x" * (LONGEST_NAME + 1), "upload"),
        ("x" * LONGEST_NAME + ".tar.gz", "upload.gz"),
        ("x" * LONGEST_NAME + ".much too long", "upload"),
        ("\u202e.t\u202ext", "upload"),
    ],
)
def test_a_name_that_cannot_be_shown_is_replaced(raw: str, shown: str) -> None:
    """A plain extension is kept, because programs choose by it."""
    assert display_name(raw) == shown
    assert display_name(raw, "a.txt") == "a.txt"
    assert display_name("a.txt", raw) == "a.txt"
    assert display_name(raw, raw) == shown


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("report.pdf", "report.pdf"),
        ("a b,c;d.txt", "a b,c;d.txt"),
        ("100%.txt", "100%.txt"),
        ("%41.txt", "_41.txt"),
        ('a "b".txt', "a _b_.txt"),
        ("naïve café.txt", "naive cafe.txt"),
        ("Ångström 5€.txt", "Angstrom 5_.txt"),
        ("名前.txt", "upload.txt"),
        ("😀", "upload"),
        ("\uff0e\uff0e\uff0fa", "___a"),
    ],
)
def test_a_name_has_an_ascii_form_that_needs_no_escaping(name: str, plain: str) -> None:
    assert ascii_name(name) == plain


@given(st.text(st.characters(), max_size=300))
def test_the_ascii_form_of_any_name_is_safe_in_quotes(name: str) -> None:
    plain = ascii_name(name)
    assert plain
    assert re.fullmatch(r"[ !#-.0-\[\]-~]+", plain)
    assert not re.search("%[0-9A-Fa-f]{2}", plain)


@given(st.text(st.characters(), max_size=400))
def test_any_input_is_refused_or_gives_a_single_harmless_line(raw: str) -> None:
    try:
        name = display_name(raw)
    except ValueError:
        return
    assert 0 < len(name) <= LONGEST_NAME
    assert not set(name) & set("/\\\r\n\0")
    assert name not in {".", ".."}
    assert name.splitlines() == [name]
    assert name.encode()
    assert display_name(name) == name


def picture(kind: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (9, 9)).save(file, kind)
    return file.getvalue()


def archive(name: str) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as zipped:
        zipped.writestr(name, "x")
    return file.getvalue()


@pytest.mark.parametrize(
    ("head", "declared", "decided"),
    [
        (picture("PNG"), "text/plain", "image/png"),
        (picture("JPEG"), "image/png", "image/jpeg"),
        (picture("GIF"), "image/gif", "image/gif"),
        (picture("WEBP"), "application/octet-stream", "image/webp"),
        (b"%PDF-1.7\n", "application/octet-stream", "application/pdf"),
        (archive("notes.txt"), "application/zip", "application/zip"),
        (archive("word/document.xml"), "image/png", "application/zip"),
        (b"<!DOCTYPE html><script>", "image/png", "text/html"),
        (b'<svg xmlns="http://www.w3.org/2000/svg">', "image/png", "image/svg+xml"),
        (b"SQLite format 3\0", "text/plain", "application/octet-stream"),
    ],
)
def test_the_first_bytes_decide_the_media_type(head: bytes, declared: str, decided: str) -> None:
    assert media_type(head, declared) == decided


@pytest.mark.parametrize(
    ("head", "declared"),
    [
        (b"Dear Ada,\n", "text/plain"),
        (b"BM is how a bitmap begins.", "text/plain"),
        (b'{"a": 1}', "application/json"),
        (b'<?xml version="1.0"?><feed>', "application/atom+xml"),
        (b"", "text/csv"),
    ],
)
def test_a_declared_type_of_text_is_accepted_if_the_bytes_are_text_of_no_known_type(
    head: bytes, declared: str
) -> None:
    assert media_type(head, declared) == declared


@pytest.mark.parametrize(
    ("head", "declared"),
    [
        (b"Dear Ada,\n", "image/png"),
        (b"Dear Ada,\n", "application/pdf"),
        (b"", "application/zip"),
        (b"\1\2\0\3", "text/plain"),
        (b"\x7fELF\2\1\1\0", "text/plain"),
        (b"RIFF....ABCD", "image/webp"),
    ],
)
def test_a_declared_type_with_a_signature_that_the_bytes_lack_is_rejected(
    head: bytes, declared: str
) -> None:
    assert media_type(head, declared) == "application/octet-stream"


@pytest.mark.parametrize(
    ("head", "declared", "decided"),
    [
        (b"na\xefve", "text/csv; charset=windows-1252", "text/csv; charset=windows-1252"),
        (b"<!DOCTYPE html>", "text/html; charset=koi8-r", "text/html; charset=koi8-r"),
        (b"<!DOCTYPE html>", "text/plain; charset=koi8-r", "text/html; charset=koi8-r"),
        (b"<!DOCTYPE html>", "image/png", "text/html"),
        (picture("PNG"), "text/plain; charset=utf-8", "image/png"),
        (b"\1\2\0\3", "text/plain; charset=utf-8", "application/octet-stream"),
        (b"\xef\xbb\xbfHello", "text/plain", "text/plain"),
        ("Hello".encode("utf-16"), "text/plain", "text/plain"),
        ("Hello".encode("utf-32"), "text/plain", "text/plain"),
        (
            "Hello".encode("utf-16-le"),
            "text/plain; charset=UTF-16LE",
            "text/plain; charset=UTF-16LE",
        ),
        ("Hello".encode("utf-16-le"), "text/plain", "application/octet-stream"),
    ],
)
def test_a_text_keeps_a_declared_charset_and_gets_no_other(
    head: bytes, declared: str, decided: str
) -> None:
    assert media_type(head, declared) == decided


BEGINNINGS = [
    b"",
    b"\x89PNG\r\n\x1a\n",
    b"\xff\xd8\xff",
    b"PK\3\4",
    b"%PDF-",
    b"<svg",
    b"RIFF",
    b"\0",
]
BINARY_TYPES = ["image/png", "application/pdf", "application/zip", "audio/mpeg", "font/woff2"]


@given(
    beginning=st.sampled_from(BEGINNINGS),
    rest=st.binary(),
    declared=st.sampled_from(BINARY_TYPES),
)
def test_for_any_bytes_a_declared_binary_type_is_ignored_and_the_result_is_a_valid_header(
    beginning: bytes, rest: bytes, declared: str
) -> None:
    decided = media_type(beginning + rest, declared)
    assert decided == media_type(beginning + rest, "application/octet-stream")
    assert re.fullmatch(r"[a-z]+/[a-z0-9.+-]+", decided)
