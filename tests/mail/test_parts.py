"""The parts of a mail: the same as those that the standard library finds, in bounded memory."""

import tracemalloc
from email import message_from_bytes, policy
from email.message import EmailMessage, Message
from io import BytesIO
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.mail import parts as parts_module
from app.mail.parts import MOST_CONTAINERS, MOST_PARTS, Part, decoded, find_parts

MB = 1_000_000
MIXED = b"Content-Type: multipart/mixed; boundary=b\r\n\r\n"


def parts_of(mail: bytes) -> list[tuple[str, bytes]]:
    """Return the content type and the decoded body of each part."""
    file = BytesIO(mail)
    return [(part.content_type, body_of(file, part)) for part in find_parts(file)]


def body_of(file: BytesIO, part: Part) -> bytes:
    return b"".join(decoded(file, part))


def only_part(head: bytes, body: bytes = b"") -> tuple[Part, bytes]:
    """Return the part of a mail that has only one, and its decoded body."""
    file = BytesIO(head + b"\r\n\r\n" + body)
    (part,) = find_parts(file)
    return part, body_of(file, part)


BODIES = st.binary(max_size=300)
TEXTS = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=300)


@pytest.mark.thorough
@settings(deadline=None)
@given(
    text=TEXTS,
    html=st.none() | TEXTS,
    attachments=st.lists(BODIES, max_size=3),
    encoding=st.sampled_from(["base64", "quoted-printable", "8bit"]),
    line_break=st.sampled_from(["\n", "\r\n"]),
)
def test_a_valid_mail_has_the_parts_that_the_standard_library_finds(
    text: str, html: str | None, attachments: list[bytes], encoding: str, line_break: str
) -> None:
    mail = EmailMessage(policy=policy.SMTPUTF8.clone(linesep=line_break))
    mail.set_content(text, cte=encoding if text else None)
    if html is not None:
        mail.add_alternative(html, subtype="html")
    for number, content in enumerate(attachments):
        mail.add_attachment(content, "image", "png", filename=f"{number}.png")
    raw = mail.as_bytes()
    leaves = [part for part in message_from_bytes(raw).walk() if not part.is_multipart()]

    assert parts_of(raw) == [(part.get_content_type(), payload_of(part)) for part in leaves]


def payload_of(part: Message) -> bytes:
    payload: Any = part.get_payload(decode=True)
    return bytes(payload)


def test_the_line_break_before_a_delimiter_belongs_to_the_delimiter() -> None:
    for line_break in (b"\r\n", b"\n"):
        mail = MIXED + b"left out\r\n--b\r\n\r\none\r\n\r\n--b \t\r\n\r\ntwo\r\n--b--\r\nleft out"
        parts = parts_of(mail.replace(b"\r\n", line_break))
        assert [body for _, body in parts] == [b"one" + line_break, b"two"]


@pytest.mark.parametrize(
    ("mail", "bodies"),
    [
        (b"", [b""]),
        (b"\r\n", [b""]),
        (b"no head", [b"no head"]),
        (b"Subject: x", [b""]),
        (b"From ada\r\nSubject: x\r\nno head\r\nmore", [b"no head\r\nmore"]),
        # Containers that are not closed, or without parts
        (MIXED, [b""]),
        (MIXED + b"hi", [b"hi"]),
        (MIXED + b"--b--\r\nhi", [b""]),
        (MIXED + b"hi\r\n--b--\r\n--b\r\n\r\nmore", [b"hi"]),
        (MIXED + b"--b", [b""]),
        (MIXED + b"--b\r\n--b\r\n\r\nhi", [b"", b"hi"]),
        (MIXED + b"--b\r\n\r\n--b\r\n\r\nhi", [b"", b"hi"]),
        (MIXED + b"--b\r\nSubject: x\r\n--b--", [b""]),
        (MIXED + b"--b\r\n\r\nhi\r\n--bb\r\n-- b\r\n --b", [b"hi\r\n--bb\r\n-- b\r\n --b"]),
        # A container in a container: its own delimiter, and that of the outer one, end its parts.
        (
            MIXED + b"--b\r\nContent-Type: multipart/related; boundary=c\r\n\r\n"
            b"--c\r\n\r\none\r\n--c--\r\nleft out\r\n--b\r\n\r\ntwo\r\n--b--",
            [b"one", b"two"],
        ),
        (
            MIXED + b"--b\r\nContent-Type: multipart/related; boundary=c\r\n\r\n"
            b"--c\r\n\r\none\r\n--b\r\n\r\ntwo\r\n--c\r\n",
            [b"one", b"two\r\n--c\r\n"],
        ),
        (
            MIXED + b"--b\r\nContent-Type: multipart/related; boundary=c\r\n\r\nhi\r\n--b--",
            [b"hi"],
        ),
        # The same boundary in both: the inner container is a text.
        (MIXED + b"--b\r\n" + MIXED + b"hi\r\n--b\r\n\r\nmore\r\n--b--", [b"hi", b"more"]),
        # Boundaries that are empty or no boundaries
        (b"Content-Type: multipart/mixed\r\n\r\nhi\r\n--\r\n", [b"hi\r\n--\r\n"]),
        (b'Content-Type: multipart/mixed; boundary=""\r\n\r\n--\r\nhi', [b"--\r\nhi"]),
        (b"Content-Type: text/plain; boundary=b\r\n\r\n--b\r\n\r\nhi", [b"--b\r\n\r\nhi"]),
        (b"Content-Type: multipart/mixed; boundary*=utf-7''+2AA-\r\n\r\nhi", [b"hi"]),
        (
            b"Content-Type: multipart/mixed; boundary=\xff\r\n\r\n--\xff\r\n\r\nhi",
            [b"--\xff\r\n\r\nhi"],
        ),
    ],
)
def test_a_malformed_mail_has_parts_as_far_as_they_can_be_told(
    mail: bytes, bodies: list[bytes]
) -> None:
    parts = parts_of(mail)
    assert [body for _, body in parts] == bodies
    assert {content_type for content_type, _ in parts} == {"text/plain"}


def test_an_attached_mail_is_one_part() -> None:
    inner = b"Content-Type: multipart/mixed; boundary=c\r\n\r\n--c\r\n\r\ninner\r\n--c--"
    mail = MIXED + b"--b\r\nContent-Type: message/rfc822\r\n\r\n" + inner + b"\r\n--b--"
    assert parts_of(mail) == [("message/rfc822", inner)]


@pytest.mark.parametrize(
    ("body", "content"),
    [
        (b"aGVsbG8=", b"hello"),
        (b"aGVs\r\nbG8=\r\n", b"hello"),
        (b"aGVsbG8", b"hello"),
        (b"a G*V\xffs\x00bG8=", b"hello"),
        (b"aGVsbG8=\r\n_______\r\nThe list's footer\r\n", b"hello"),
        (b"aGVsbG8h", b"hello!"),
        (b"aGVsb", b"hel"),
        (b"a", b""),
        (b"=", b""),
        (b"", b""),
    ],
)
def test_base64_ends_with_its_padding_and_other_characters_are_left_out(
    body: bytes, content: bytes
) -> None:
    assert only_part(b"Content-Transfer-Encoding: BASE64", body)[1] == content


@pytest.mark.parametrize(
    ("body", "content"),
    [
        (b"h=C3=A9 =3D=\r\n1", b"h\xc3\xa9 =1"),
        (b"a=\n=\nb", b"ab"),
        (b"50 =x, =4", b"50 =x, =4"),
        (b"=", b""),
        (b"", b""),
    ],
)
def test_quoted_printable_keeps_what_is_no_escape(body: bytes, content: bytes) -> None:
    assert only_part(b"Content-Transfer-Encoding: quoted-printable", body)[1] == content


@given(content=st.binary(max_size=200), block=st.integers(1, 20))
def test_a_body_does_not_depend_on_the_blocks_in_which_it_is_read(
    content: bytes, block: int
) -> None:
    for encoding in ("base64", "quoted-printable", "8bit"):
        mail = EmailMessage(policy=policy.SMTP)
        mail.set_content(content, "image", "png", cte=encoding)
        file = BytesIO(mail.as_bytes())
        (part,) = find_parts(file)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(parts_module, "_BLOCK", block)
            pieces = list(decoded(file, part))
        assert b"".join(pieces) == payload_of(message_from_bytes(file.getvalue()))


@pytest.mark.parametrize(
    ("field", "filename"),
    [
        (b"Content-Disposition: attachment; filename=a.pdf", "a.pdf"),
        (b'Content-Disposition: inline; filename="a \\"b\\".pdf"', 'a "b".pdf'),
        (b"Content-Disposition: attachment; filename*=UTF-8''na%C3%AFve.txt", "naïve.txt"),
        (b"Content-Disposition: attachment; filename*0=na; filename*1=me.txt", "name.txt"),
        (b"Content-Disposition: attachment; filename==?utf-8?B?w6k=?=", "é"),
        (b'Content-Disposition: attachment; filename="=?utf-8?Q?=C3=A9.txt?="', "é.txt"),
        (b"Content-Disposition: attachment; filename=\xc3\xa9.txt", "é.txt"),
        (b"Content-Disposition: attachment; filename=\xe9.txt", "\ufffd.txt"),
        (b"Content-Disposition: attachment; filename*=utf-7''+2AA-", "\ufffd"),
        (b"Content-Disposition: attachment; filename*=no-such''%ff", "\xff"),
        (b"Content-Disposition: attachment; filename=../../x", "../../x"),
        (b"Content-Type: image/png; name=a.png", "a.png"),
        (b"Content-Disposition: attachment", None),
        (b"Content-Disposition: attachment; filename=" + b"x" * 2_000, None),
    ],
)
def test_the_name_of_a_file_is_decoded_in_every_form_that_mail_programs_use(
    field: bytes, filename: str | None
) -> None:
    assert only_part(field)[0].filename == filename


@pytest.mark.parametrize(
    ("value", "content_type", "charset"),
    [
        (b"text/html; charset=ISO-8859-1", "text/html", "iso-8859-1"),
        (b"TEXT/HTML", "text/html", "utf-8"),
        (b"text", "text/plain", "utf-8"),
        (b"\xff;;=", "text/plain", "utf-8"),
        (b"text/html\x00", "application/octet-stream", "utf-8"),
        (b"text/ht ml", "application/octet-stream", "utf-8"),
        ("text/hté".encode(), "application/octet-stream", "utf-8"),
        (b"multipart/mixed", "text/plain", "utf-8"),
    ],
)
def test_a_content_type_that_is_not_well_formed_is_never_repeated(
    value: bytes, content_type: str, charset: str
) -> None:
    part, _ = only_part(b"Content-Type: " + value)
    assert (part.content_type, part.charset) == (content_type, charset)


def test_the_first_of_several_fields_counts() -> None:
    part, _ = only_part(b"content-type: text/html\r\nContent-Type: image/png")
    assert part.content_type == "text/html"


def test_a_field_that_the_standard_library_cannot_parse_has_its_default(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AttributeError

    for name in ("get_content_type", "get_content_charset", "get_filename", "get_boundary"):
        monkeypatch.setattr(Message, name, fail)
    part, body = only_part(b"Content-Type: text/html; charset=latin-1", b"hi")
    assert (part.content_type, part.charset, part.filename) == ("text/plain", "utf-8", None)
    assert body == b"hi"


def test_a_container_that_is_nested_too_deeply_is_a_text() -> None:
    heads = [
        b"Content-Type: multipart/mixed; boundary=b%d\r\n\r\n--b%d\r\n" % (n, n)
        for n in range(MOST_CONTAINERS + 20)
    ]
    (part,) = parts_of(b"".join(heads))
    assert part == (
        "text/plain",
        b"--b%d\r\n" % MOST_CONTAINERS + b"".join(heads[MOST_CONTAINERS + 1 :]),
    )


def test_the_parts_of_a_mail_are_bounded() -> None:
    assert len(parts_of(MIXED + b"--b\r\n\r\n" * 2 * MOST_PARTS)) == MOST_PARTS


LARGE = MB
HOSTILE = {
    "a large attachment": MIXED
    + b"--b\r\nContent-Transfer-Encoding: base64\r\n\r\n"
    + (b"QUJD" * 19 + b"\r\n") * (LARGE // 78),
    "one line": MIXED + b"--b\r\n\r\n" + b"x" * LARGE,
    "one line of quoted-printable": MIXED
    + b"--b\r\nContent-Transfer-Encoding: quoted-printable\r\n\r\n"
    + b"x" * LARGE,
    "lines that look like delimiters": MIXED + b"--b\r\n\r\n" + b"--\r\n" * (LARGE // 4),
    "a head": b"Subject: x\r\n" * (LARGE // 12),
    "empty parts": MIXED + b"--b\r\n\r\n" * (LARGE // 7),
    "containers": MIXED
    + b"--b\r\nContent-Type: multipart/mixed; boundary=c\r\n\r\n" * (LARGE // 52),
    "nested containers": b"".join(
        b"Content-Type: multipart/mixed; boundary=b%d\r\n\r\n--b%d\r\n" % (n, n)
        for n in range(LARGE // 60)
    ),
}


@pytest.mark.parametrize("mail", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.thorough
def test_a_large_mail_takes_little_memory(mail: bytes) -> None:
    file = BytesIO(mail)
    tracemalloc.start()
    for part in find_parts(file):
        for _ in decoded(file, part):
            pass
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < MB


def test_delimiters_are_found_at_the_start_of_a_line_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """A long line is read in blocks, and a block may begin like a delimiter."""
    monkeypatch.setattr(parts_module, "_BLOCK", 60)
    for length in range(50, 70):
        body = b"x" * length + b"--b\r\nx"
        assert [content for _, content in parts_of(MIXED + b"--b\r\n\r\n" + body)] == [body]


PIECES = st.sampled_from([b"--b", b"--b--", b"--", b"\r\n", b"\n", b"\r", b" ", b"x" * 20])


@given(pieces=st.lists(PIECES, max_size=60), block=st.integers(70, 120))
def test_the_parts_do_not_depend_on_the_blocks_in_which_a_mail_is_read(
    pieces: list[bytes], block: int
) -> None:
    mail = MIXED + b"--b\n\n" + b"".join(pieces)
    expected = parts_of(mail)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts_module, "_BLOCK", block)
        assert parts_of(mail) == expected
