"""What a stranger's file is called, and what it is."""

import io
import re
import zipfile

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from app.files.names import LONGEST_NAME, display_name, media_type


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
def test_a_name_is_the_last_component_of_what_the_sender_called_it(raw: str, shown: str) -> None:
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
        "secret\u202egpj.exe",
        "secret\u2066",
        "secret\ud800",
        "=?utf-8?q?secret?=",
        "secret" * 100,
    ],
)
def test_a_name_that_could_mislead_is_refused_without_being_repeated(raw: str) -> None:
    with pytest.raises(ValueError, match=r"^the file name ") as refused:
        display_name(raw)
    assert "secret" not in str(refused.value)


@given(st.text(st.characters(), max_size=400))
def test_whatever_the_sender_wrote_the_shown_name_is_one_harmless_line(raw: str) -> None:
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
    ("head", "declared", "said"),
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
def test_the_first_bytes_decide_what_a_file_is(head: bytes, declared: str, said: str) -> None:
    assert media_type(head, declared) == said


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
def test_a_declared_kind_of_text_is_believed_where_the_bytes_are_silent(
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
def test_a_declared_type_that_the_bytes_should_confirm_and_do_not_is_never_believed(
    head: bytes, declared: str
) -> None:
    assert media_type(head, declared) == "application/octet-stream"


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
NEVER_BELIEVED = ["image/png", "application/pdf", "application/zip", "audio/mpeg", "font/woff2"]


@given(
    beginning=st.sampled_from(BEGINNINGS),
    rest=st.binary(),
    declared=st.sampled_from(NEVER_BELIEVED),
)
def test_whatever_the_bytes_they_decide_and_a_header_can_hold_what_they_are(
    beginning: bytes, rest: bytes, declared: str
) -> None:
    said = media_type(beginning + rest, declared)
    assert said == media_type(beginning + rest, "application/octet-stream")
    assert re.fullmatch(r"[a-z]+/[a-z0-9.+-]+", said)
