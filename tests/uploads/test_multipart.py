"""The parser of an upload's form, which reads its only file while it arrives."""

import re
import time
from collections.abc import AsyncIterator, Iterable
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from app.uploads.multipart import (
    OVERHEAD_BYTES,
    InvalidForm,
    MalformedMultipart,
    NotMultipart,
    PartInfo,
    file_part,
)

pytestmark = pytest.mark.anyio

TYPE = "multipart/form-data; boundary=b"
FILE = b'Content-Disposition: form-data; name="file"; filename="a.txt"'


def part(content: bytes, *headers: bytes) -> bytes:
    return b"--b\r\n" + b"".join(header + b"\r\n" for header in headers) + b"\r\n" + content


def form(*parts: bytes) -> bytes:
    return b"\r\n".join(parts) + b"\r\n--b--\r\n"


async def stream(chunks: Iterable[bytes]) -> AsyncIterator[bytes]:
    for chunk in chunks:
        yield chunk


async def read(chunks: Iterable[bytes], content_type: str = TYPE) -> tuple[PartInfo, bytes]:
    info, content = await file_part(content_type, stream(chunks))
    return info, b"".join([piece async for piece in content])


async def test_a_form_with_a_file_gives_its_name_its_type_and_its_bytes() -> None:
    body = form(part(b"Hello\r\n", FILE, b"Content-Type: Text/Plain; format=flowed"))
    assert await read([body]) == (PartInfo("a.txt", "text/plain"), b"Hello\r\n")


async def test_an_empty_file_is_accepted() -> None:
    assert await read([form(part(b"", FILE))]) == (
        PartInfo("a.txt", "application/octet-stream"),
        b"",
    )


# Sequences that resemble the delimiter `CRLF--b`, and are content.
NEARLY = b"\r\n-\r\n--\r\n--c\r\r\n\r\n--\r--b\n--b\r\n-b\r\n --b\r"


@pytest.mark.parametrize("cut", range(len(form(part(NEARLY, FILE))) + 1))
@pytest.mark.thorough
async def test_a_body_may_be_split_into_two_chunks_anywhere(cut: int) -> None:
    body = form(part(NEARLY, FILE))
    assert (await read([body[:cut], b"", body[cut:]]))[1] == NEARLY


# Plain stretches in between, so that some chunks contain no part of a delimiter.
CONTENT = b"x" * 20 + NEARLY + b"x" * 20 + NEARLY
MIXED = form(part(CONTENT, FILE))
CUTS = st.lists(st.integers(0, len(MIXED)), max_size=30).map(sorted)


@given(CUTS)
async def test_a_body_may_be_split_into_any_chunks(cuts: list[int]) -> None:
    chunks = [MIXED[start:end] for start, end in pairwise([0, *cuts, len(MIXED)])]
    assert (await read(chunks))[1] == CONTENT


async def test_a_chunk_with_only_content_is_not_copied() -> None:
    """Almost all chunks of a large file are such chunks."""
    chunk = b"\r\nx" * 100
    _, content = await file_part(TYPE, stream([part(b"Hello", FILE), chunk, b"\r\n--b--\r\n"]))
    assert any([piece is chunk async for piece in content])


async def test_a_body_may_arrive_byte_by_byte() -> None:
    body = form(part(NEARLY, FILE))
    assert (await read(body[i : i + 1] for i in range(len(body))))[1] == NEARLY


@given(st.lists(st.sampled_from([b"\r", b"\n", b"-", b"--b", b"\r\n--", b"x"])), st.integers(1, 9))
async def test_any_content_without_a_delimiter_is_returned_unchanged(
    pieces: list[bytes], size: int
) -> None:
    content = b"".join(piece + b"x" for piece in pieces)
    body = form(part(content, FILE))
    chunks = [body[i : i + size] for i in range(0, len(body), size)]
    assert (await read(chunks))[1] == content


@pytest.mark.parametrize("rest", [b"X", b"-X", b" \r\n", b"\r", b"\n"])
async def test_a_line_that_begins_with_the_delimiter_is_malformed(rest: bytes) -> None:
    """RFC 2046, section 5.1.1, forbids it in a file: the client must choose another boundary."""
    body = form(part(b"Hello\r\n--b" + rest + b"Hello", FILE))
    for cut in range(len(body) + 1):
        with pytest.raises(MalformedMultipart):
            await read([body[:cut], body[cut:]])


async def test_a_line_break_before_the_form_and_bytes_after_it_are_skipped() -> None:
    body = b"\r\n" + form(part(b"Hello", FILE)) + b"Good bye"
    assert (await read([body]))[1] == b"Hello"


@pytest.mark.parametrize("preamble", [b"Hello", b"Hello\r\n", b"\n", b"\r\n\r\n", b"--a\r\n"])
async def test_bytes_before_the_first_delimiter_are_malformed_in_any_chunks(
    preamble: bytes,
) -> None:
    """RFC 2046, section 5.1.1, allows such a preamble, but clients of forms send none."""
    body = preamble + form(part(b"Hello", FILE))
    for cut in range(len(body) + 1):
        with pytest.raises(MalformedMultipart):
            await read([body[:cut], body[cut:]])


TOKENS = [b"--b", b"\r\n", b"\r", b"\n", b"-", b" ", b"Hello", b": ", FILE, b"\r\n--b", b"X: a\r\n"]
DAMAGE = st.lists(st.sampled_from(TOKENS), max_size=6).map(b"".join)
LONG_HEADER = b"X: " + b"x" * 4093  # the longest that is accepted


@st.composite
def damaged_forms(draw: st.DrawFn) -> bytes:
    """Insert random tokens into a form: before it, into its headers, its file, or after it."""
    start, header, content, end = (draw(DAMAGE) for _ in range(4))
    return start + form(part(content, FILE, header + b"X: b") + end)


async def answer(chunks: Iterable[bytes]) -> tuple[PartInfo, bytes] | None:
    """Return the file, or None if the form is refused.

    A damaged second part is refused as a second part (422) or as malformed (400): the parser may
    see either first.
    """
    try:
        return await read(chunks)
    except (MalformedMultipart, InvalidForm):
        return None


@given(damaged_forms(), st.lists(st.integers(0, 300), max_size=10).map(sorted))
@example(b"Hello\r\n" + form(part(b"", FILE)), [5])
@example(form(part(b"", b"\nX: a", FILE)), [6])
@example(form(part(b"", LONG_HEADER, FILE)), [5 + len(LONG_HEADER) + 1])
async def test_the_answer_to_a_form_does_not_depend_on_its_chunks(
    body: bytes, cuts: list[int]
) -> None:
    whole = await answer([body])
    cut = [min(cut, len(body)) for cut in cuts]
    assert whole == await answer(body[start:end] for start, end in pairwise([0, *cut, len(body)]))
    assert whole == await answer(body[i : i + 1] for i in range(len(body)))


@pytest.mark.parametrize(
    "parameters",
    [
        b'name="x"; name="file"; filename="a.txt"',
        b'name="file"; Name="file"; filename="a.txt"',
        b'name="file"; filename="a.txt"; filename="b.txt"',
        b"name=\"file\"; filename*=utf-8''a; filename*=utf-8''b",
        b'name="file"x; filename="a.txt"',
        b'name="file"; filename="a.txt"b.exe',
        b'name="file"; filename="a.txt""b.exe"',
    ],
)
async def test_parameters_that_programs_would_read_differently_are_malformed(
    parameters: bytes,
) -> None:
    with pytest.raises(MalformedMultipart):
        await read([form(part(b"", b"Content-Disposition: form-data; " + parameters))])


@pytest.mark.parametrize(
    ("filename", "shown"),
    [
        ("naïve 名前.txt".encode(), "naïve 名前.txt"),
        (b"a%22b%22.txt", 'a"b".txt'),  # from a browser (WHATWG HTML)
        (b"a%0D%0A%41%2522.txt", "a%0D%0A%41%2522.txt"),
        (b"../../etc/passwd", "passwd"),
        (b'a \\"b\\".txt', 'a "b".txt'),
        (b"..", "upload"),
        (b"C:\\a\\b.txt", "b.txt"),
        (b"a.txt\"; filename*=\"UTF-8''b.txt", "a.txt"),
    ],
)
async def test_a_file_name_is_converted_to_a_harmless_display_name(
    filename: bytes, shown: str
) -> None:
    header = b'Content-Disposition: form-data; name="file"; filename="' + filename + b'"'
    assert (await read([form(part(b"", header))]))[0].filename == shown


@pytest.mark.parametrize(
    ("filenames", "shown"),
    [
        (b"filename*=utf-8''%C3%B6ne.txt", "öne.txt"),
        (b"filename=\"=?utf-8?B?w7ZuZS50eHQ=?=\"; filename*=utf-8''%C3%B6ne.txt", "öne.txt"),
        (b"filename*=UTF-8'en'%E5%90%8D.txt; filename=a.txt", "名.txt"),
        (b"FileName* = ISO-8859-1''na%EFve.txt", "naïve.txt"),
        (b"filename=a (1).txt ", "a (1).txt"),
        (b"filename*=utf-8''..%2F..%2Fpasswd", "passwd"),
        (b"filename=\"a; filename*=utf-8''b\"", "a; filename*=utf-8''b"),
        (b'filename="a\\"; filename*=utf-8\'\'b"', "a\"; filename*=utf-8''b"),
    ],
)
async def test_the_extended_file_name_takes_precedence(filenames: bytes, shown: str) -> None:
    """RFC 7578, section 4.2, forbids it, but .NET sends both names, and urllib3 1.x only this."""
    header = b"Content-Disposition: form-data; name=file; " + filenames
    assert (await read([form(part(b"", header))]))[0].filename == shown


@pytest.mark.parametrize(
    "extended",
    [
        b"utf-8''%C3",
        b"utf-8''%ED%A0%80",
        b"utf-8''%zz",
        b"utf-8''a b",
        b"utf-16''b.txt",
        b"''b.txt",
        b"utf-8'b.txt",
        b"b.txt",
        b"\"utf-8''b.txt\"",
        b"utf-8''" + b"x" * 256,
        b"utf-8''=%3Futf-8%3Fq%3Fb%3F=",
    ],
)
async def test_an_invalid_extended_file_name_falls_back_to_the_plain_one(
    extended: bytes,
) -> None:
    header = b"Content-Disposition: form-data; name=file; filename*=" + extended
    assert (await read([form(part(b"", header + b"; filename=a.txt"))]))[0].filename == "a.txt"
    assert (await read([form(part(b"", header))]))[0].filename.startswith("upload")


@pytest.mark.parametrize(
    ("filename", "shown"),
    [
        ("naïve.txt".encode("latin-1"), "upload.txt"),
        (b"=?utf-8?B?w7ZuZS50eHQ=?=", "upload"),
        ("a\u202egpj.exe".encode(), "upload.exe"),
        (b"x" * 300 + b".tar", "upload.tar"),
    ],
)
async def test_a_file_with_a_name_that_cannot_be_shown_is_accepted(
    filename: bytes, shown: str
) -> None:
    body = form(part(b"Hello", FILE.replace(b"a.txt", filename)))
    info, content = await read([body])
    assert (info.filename, content) == (shown, b"Hello")


@pytest.mark.parametrize("character", ["%00", "%0D", "%0A", "%1B", "%7F", "%C2%85", "%E2%80%A8"])
async def test_an_extended_file_name_with_control_characters_is_refused(character: str) -> None:
    header = b"Content-Disposition: form-data; name=file; filename=a; filename*=utf-8''secret"
    with pytest.raises(InvalidForm, match="control") as refused:
        await read([form(part(b"", header + character.encode()))])
    assert "secret" not in refused.value.detail


@pytest.mark.parametrize(
    ("declared", "kept"),
    [
        (b"text/csv; charset=windows-1252", "text/csv; charset=windows-1252"),
        (b'TEXT/CSV;CHARSET="UTF-8"; header=present', "text/csv; charset=UTF-8"),
        (b"application/json;charset=utf-8", "application/json; charset=utf-8"),
        (b"text/csv; charset=", "text/csv"),
        (b'text/csv; charset="a b"', "text/csv"),
        (b'text/csv; charset="a;b"', "text/csv"),
        (b"text/csv; charset=" + b"x" * 41, "text/csv"),
        (b"text/csv; charset=\xff", "text/csv"),
        (b"image/png; charset=binary", "image/png"),
    ],
)
async def test_a_text_keeps_its_declared_charset(declared: bytes, kept: str) -> None:
    info, _ = await read([form(part(b"", FILE, b"Content-Type: " + declared))])
    assert info.content_type == kept


@given(declared=st.binary().filter(lambda declared: not set(declared) & set(b"\r\n\0")))
async def test_any_declared_type_becomes_a_valid_header_value(
    declared: bytes,
) -> None:
    info, _ = await read([form(part(b"", FILE, b"Content-Type: " + declared))])
    assert re.fullmatch(
        r"[a-z0-9!#$&^_.+-]+/[a-z0-9!#$&^_.+-]+(; charset=[!#-'*+.0-9A-Z^-z|~-]+)?",
        info.content_type,
    )


@pytest.mark.parametrize(
    "declared",
    [
        b"nonsense",
        b"a/b\v",
        b"text/pl\xe4in",
        b"a/" + b"x" * 200,
        b"text/csv; charset=a; charset=b",
        b'text/csv; charset="a"b',
    ],
)
async def test_an_invalid_media_type_is_replaced_by_octet_stream(declared: bytes) -> None:
    info, _ = await read([form(part(b"", FILE, b"Content-Type: " + declared))])
    assert info.content_type == "application/octet-stream"


@pytest.mark.parametrize(
    "content_type",
    [
        "",
        "application/json",
        "multipart/mixed; boundary=b",
        "multipart/form-data",
        "multipart/form-data; boundary=",
        'multipart/form-data; boundary="b "',
        'multipart/form-data; boundary="\r\n"',
        "multipart/form-data; boundary=" + "b" * 71,
        "multipart/form-data; boundary=" + "b" * 300,
        "multipart/form-data; boundary=b€",
        "multipart/form-data; boundary=b@c",
        "multipart/form-data; boundary=a; boundary=b",
        'multipart/form-data; boundary="b"c',
    ],
)
async def test_a_body_of_another_type_is_not_read(content_type: str) -> None:
    with pytest.raises(NotMultipart):
        await read([form(part(b"", FILE))], content_type)


@pytest.mark.parametrize(
    ("body", "pointer", "detail"),
    [
        (b"--b--\r\n", "/file", "required"),
        (form(part(b"", b'Content-Disposition: form-data; name="file"')), "/file", "no file was"),
        (form(part(b"", FILE.replace(b"a.txt", b""))), "/file", "no file was"),
        (form(part(b"", FILE.replace(b'filename="a.txt"', b"filename*="))), "/file", "no file"),
        (form(part(b"", FILE.replace(b"a.txt", b"a\0b"))), "/file", "control"),
        (form(part(b"", b'Content-Disposition: form-data; name="secret"')), "", "no other"),
        (form(part(b"", FILE), part(b"", FILE)), "/file", "one file"),
        (form(part(b"", FILE), part(b"", FILE.replace(b'"file"', b'"secret"'))), "", "no other"),
    ],
)
async def test_a_form_with_missing_or_other_parts_is_invalid_and_its_input_is_not_repeated(
    body: bytes, pointer: str, detail: str
) -> None:
    with pytest.raises(InvalidForm, match=detail) as refused:
        await read([body])
    assert refused.value.pointer == pointer
    assert "secret" not in refused.value.detail


@pytest.mark.parametrize("size", range(1, 100))
@pytest.mark.thorough
async def test_a_second_part_is_refused_in_chunks_of_any_size(size: int) -> None:
    body = form(part(b"Hello", FILE), part(b"Bye", FILE))
    with pytest.raises(InvalidForm, match="one file"):
        await read(body[start : start + size] for start in range(0, len(body), size))


@pytest.mark.parametrize("length", range(len(form(part(b"Hello", FILE))) - 2))
@pytest.mark.thorough
async def test_a_truncated_body_is_malformed(length: int) -> None:
    with pytest.raises(MalformedMultipart):
        await read([form(part(b"Hello", FILE))[:length]])


@pytest.mark.parametrize(
    "body",
    [
        b"Hello",
        form(part(b"")),
        form(part(b"", b"Content-Disposition: attachment; name=file; filename=a")),
        form(part(b"", b"Content-Disposition: form-data; filename=a")),
        form(part(b"", FILE, FILE)),
        form(part(b"", b": empty", FILE)),
        form(part(b"", b"no colon", FILE)),
        form(part(b"", b"X: a\nb", FILE)),
        form(part(b"", b"X: a\rb", FILE)),
        form(part(b"", FILE, b"\n\nX: a")),
        form(part(b"", FILE, b"\rX: a")),
        form(part(b"Hello", FILE, b"Content-Length: 4")),
        form(part(b"Hello", FILE, b"Content-Length: 6")),
        form(part(b"", b"X: " + b"x" * 5000, FILE)),
        form(part(b"", FILE, *(b"X-%d: x" % i for i in range(8)))),
    ],
)
async def test_a_body_with_broken_or_too_many_headers_is_malformed(body: bytes) -> None:
    with pytest.raises(MalformedMultipart):
        await read([body])


async def test_a_form_of_1001_parts_is_refused_at_the_second_part() -> None:
    seen = 0

    def parts() -> Iterable[bytes]:
        nonlocal seen
        for seen in range(1001):  # noqa: B007  # read below
            yield part(b"", FILE) + b"\r\n"

    with pytest.raises(InvalidForm):
        await read(parts())
    assert seen == 1


async def test_ten_megabytes_of_line_ends_are_read_in_less_than_a_second() -> None:
    body = form(part(b"\r\n" * 5_000_000, FILE))
    began = time.process_time()  # processor time, so that other processes do not matter
    _, content = await read(body[i : i + 65_536] for i in range(0, len(body), 65_536))
    assert len(content) == 10_000_000
    assert time.process_time() - began < 1


async def test_too_many_bytes_after_the_form_are_refused() -> None:
    with pytest.raises(MalformedMultipart):
        await read([form(part(b"", FILE)), *[b"x"] * (OVERHEAD_BYTES + 1)])
