"""The catcher shows as much of a mail as it can parse, for any bytes."""

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from app.mail import caught as caught_module
from app.mail.caught import Caught, first_line, read, read_attachment, read_source, summarise

NAME = "1735815845000000000-0123abcd.eml"
HELLO = b"Subject: x\r\n\r\nhi"
ATTACHMENT = b"Content-Disposition: attachment; filename=a.pdf\r\n\r\npdf\r\n"


def caught(directory: Path, content: bytes, *, envelope: bytes | None = None) -> Caught:
    """Store and read a mail with this content, and assert that its summary agrees."""
    path = directory / NAME
    line = first_line("a@example.com", ["b@example.com"], content)
    path.write_bytes((line if envelope is None else envelope) + content)
    mail, summary = read(path), summarise(path)
    for name in summary.__dataclass_fields__:
        assert getattr(mail, name) == getattr(summary, name)
    for attachment in mail.attached:
        assert len(b"".join(read_attachment(path, attachment))) == attachment.size
    # Both the inbox page and the JSON must be able to encode the mail.
    for text in (
        mail.subject,
        mail.sender,
        *mail.recipients,
        mail.text,
        mail.html,
        mail.message_id,
    ):
        (text or "").encode()
    json.dumps(mail.headers).encode()
    for attachment in mail.attached:
        json.dumps(attachment.filename, ensure_ascii=False).encode()
    return mail


def nested(depth: int) -> bytes:
    """Return a mail with `depth` nested multiparts."""
    parts = (
        b"Content-Type: multipart/mixed; boundary=b%d\r\n\r\n--b%d\r\n" % (n, n)
        for n in range(depth)
    )
    return b"Subject: x\r\n" + b"".join(parts)


@pytest.mark.parametrize(
    ("content", "subject", "text"),
    [
        (b"Message-ID: <>\r\n" + HELLO, "x", "hi"),
        (b'To: ada <ada@example.com>, "\r\n' + HELLO, "x", "hi"),
        (b"From: \x00\xff <\r\n" + HELLO, "x", "hi"),
        (b"Content-Type: text/plain; charset=undefined\r\n" + HELLO, "x", "hi"),
        (b"Content-Type: text/plain; charset=punycode\r\n" + HELLO, "x", "hi"),
        (b"Content-Type: text/plain; charset=a\x00b\r\n" + HELLO, "x", "hi"),
        (b"Content-Type: text/plain; charset=zlib\r\n" + HELLO, "x", "hi"),
        (b"Content-Type: text/plain; charset=latin-1\r\nSubject: x\r\n\r\n\xe9", "x", "é"),
        (b"Content-Type: text/plain; charset=utf-7\r\nSubject: x\r\n\r\n+2AA-", "x", "\ufffd"),
        (b"Subject: =?utf-7?Q?+2AA-?=\r\n\r\nhi", "=?utf-7?Q?+2AA-?=", "hi"),
        (b"Subject: =?no-such?Q?=41?=\r\n\r\nhi", "A", "hi"),
        (b"Subject: =?utf-8?B?w6l0w6k=?=\r\n\r\nhi", "été", "hi"),
        (b"Subject: \xc3\xa9t\xe9\r\n\r\n\xff", "ét\ufffd", "\ufffd"),
        (b"Subject: one\r\n two\r\n\tthree\r\n\r\nhi", "one two\tthree", "hi"),
        (b"Subject: x\r\nContent-Type: multipart/mixed\r\n\r\nhi", "x", "hi"),
        (b"Subject: x\r\nContent-Type: multipart/mixed; boundary=b\r\n\r\nhi", "x", "hi"),
        (b"Subject: x\r\nContent-Type: \xff;;=\r\n\r\nhi", "x", "hi"),
        (b"Subject: x\r\nContent-Transfer-Encoding: base64\r\n\r\naGk=", "x", "hi"),
        (b"Subject: x\r\nContent-Transfer-Encoding: base64\r\n\r\na", "x", ""),
        (b"Subject: x\r\nContent-Transfer-Encoding: no-such\r\n\r\nhi", "x", "hi"),
        (b"\r\nhi", "", "hi"),
        (b"hi", "", "hi"),
        (b"", "", ""),
    ],
)
def test_a_malformed_mail_is_shown_as_far_as_it_can_be_parsed(
    tmp_path: Path, content: bytes, subject: str, text: str
) -> None:
    mail = caught(tmp_path, content)
    assert (mail.subject, mail.text) == (subject, text)
    assert b"".join(read_source(tmp_path / NAME)) == content
    assert mail.size == len(content)
    assert not mail.is_cut


def test_nested_parts_are_found(tmp_path: Path) -> None:
    content = nested(5) + b"Content-Type: text/html\r\n\r\n<p>\r\n--b4\r\n\r\nhi\r\n--b4--\r\n"
    mail = caught(tmp_path, content)
    assert (mail.text, mail.html) == ("hi", "<p>")


def test_an_attachment_is_not_shown_as_the_mails_text(tmp_path: Path) -> None:
    """This holds for an attached text, and for the text of a forwarded mail."""
    mail = caught(
        tmp_path,
        b"Content-Type: multipart/mixed; boundary=b\r\n\r\n"
        b"--b\r\n" + ATTACHMENT + b"--b\r\ncontent-disposition:attachment\r\n\r\nx\r\n"
        b"--b\r\nContent-Type: message/rfc822\r\n\r\nSubject: inner\r\n\r\ninner\r\n--b--\r\n",
    )
    assert (mail.text, mail.html) == (None, None)
    assert mail.attachments == 3
    assert [attachment.filename for attachment in mail.attached] == ["a.pdf", None, None]
    assert [attachment.size for attachment in mail.attached] == [3, 1, 23]


def test_every_part_besides_the_text_and_the_html_is_an_attachment(tmp_path: Path) -> None:
    """For example, pictures in the HTML, an invitation to a meeting, and a second text."""
    types = (b"text/plain", b"text/html", b"image/png", b"text/calendar", b"text/plain")
    content = b"Content-Type: multipart/mixed; boundary=b\r\n\r\n" + b"".join(
        b"--b\r\nContent-Type: %b\r\n\r\n%d\r\n" % (content_type, number)
        for number, content_type in enumerate(types)
    )
    mail = caught(tmp_path, content)
    assert (mail.text, mail.html, mail.attachments) == ("0", "1", 3)
    shown = [(attachment.content_type, attachment.size) for attachment in mail.attached]
    assert shown == [("image/png", 1), ("text/calendar", 1), ("text/plain", 3)]


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ([], True),
        (["ADA"], True),
        (["Example.org", "été", "b@"], True),
        (["strasse"], True),
        (["a@example.com b@example.org"], False),
        (["hi"], False),
        (["ada", "nothing"], False),
    ],
)
def test_a_search_compares_sender_recipients_and_subject_in_any_case(
    tmp_path: Path, words: list[str], found: bool
) -> None:
    content = "Subject: =?utf-8?B?w4l0w6k=?= Ada Straße\r\nFrom: hi\r\n\r\nhi".encode()
    line = first_line("a@example.com", ["b@example.org"], content)
    assert caught(tmp_path, content, envelope=line).has_words(words) == found


@pytest.mark.parametrize(
    "envelope",
    [
        b"",
        b"X-Envelope: {}\r\n",
        b"X-Envelope: []\r\n",
        b"X-Envelope: " + b"[" * 100_000 + b"\r\n",
        b'X-Envelope: {"sender": 1, "recipients": "x", "attachments": "x"}\r\n',
        b'X-Envelope: {"sender": "a@exa\r\n',
        b'X-Envelope: {"recipients": [null, "\\ud800"]}\r\n',
    ],
)
def test_a_file_with_a_bad_envelope_line_is_still_shown(tmp_path: Path, envelope: bytes) -> None:
    """The file may be truncated, from an earlier version, or put there by another program."""
    mail = caught(tmp_path, HELLO, envelope=envelope)
    assert (mail.subject, mail.text, mail.attachments) == ("x", "hi", None)


def test_an_address_that_is_not_utf_8_can_be_shown(tmp_path: Path) -> None:
    """The SMTP server decodes its bytes to lone surrogates."""
    line = first_line(None, ["ad\udce9@example.com"], HELLO)
    mail = caught(tmp_path, HELLO, envelope=line)
    assert (mail.sender, mail.recipients) == ("", ("ad\ufffd@example.com",))


def test_a_file_that_cannot_be_read_is_shown_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / NAME).mkdir()
    assert summarise(tmp_path / NAME).subject == "(cannot be read: Is a directory)"
    assert read(tmp_path / NAME).subject == "(cannot be read: Is a directory)"
    with pytest.raises(IsADirectoryError):
        next(read_source(tmp_path / NAME))


@pytest.mark.parametrize("content_type", ["text/plain", "text/html"])
def test_only_the_beginning_of_a_long_text_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content_type: str
) -> None:
    monkeypatch.setattr(caught_module, "MOST_SHOWN", 100)
    head = f"Content-Type: {content_type}\r\n\r\n".encode()
    assert not caught(tmp_path, head + b"x" * 100).is_cut
    mail = caught(tmp_path, head + b"x" * 1000)
    assert mail.is_cut
    assert mail.size == len(head) + 1000
    assert (mail.text or mail.html) == "x" * 100


def test_a_mail_with_too_many_parts_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = b"Content-Type: multipart/mixed; boundary=b\r\n\r\n" + b"--b\r\n\r\n" * 1200
    mail = caught(tmp_path, content)
    assert mail.is_cut
    assert mail.attachments == 999


def test_a_summary_reads_a_bounded_part_of_the_head(tmp_path: Path) -> None:
    before = b"A: " + b"x" * 40_000 + b"\r\n"
    path = tmp_path / NAME
    path.write_bytes(first_line("", [], b"") + before + HELLO)
    assert summarise(path).subject == ""
    assert len(read(path).headers[0][1]) < 40_000


PIECES = st.sampled_from(
    [
        b"Subject: ",
        b"Content-Type: ",
        b"content-type:multipart/mixed; boundary=b",
        b"multipart/alternative;boundary=",
        b"message/rfc822",
        b"text/html; charset*=utf-8''",
        b"text/plain; charset=",
        b"Content-Transfer-Encoding: base64",
        b"Content-Transfer-Encoding: x-uuencode",
        b"Content-Disposition: attachment",
        b"begin 666 x",
        b"=?utf-8?B?",
        b"=?utf-7?Q?+2AA-?=",
        b"=?idna?q?",
        b"unicode_escape",
        b"utf-16",
        b"?=",
        b"--b",
        b"--b--",
        b"From ",
        b"X-Envelope: ",
        b"\r\n",
        b"\r\n\r\n",
        b"\r\n ",
        b"\n",
        b"\r",
        b"\x00",
        b'"',
        b";",
        b"\\ud800",
        b"\xed\xa0\x80",
    ]
)
MAILS = st.lists(PIECES | st.binary(max_size=8), max_size=40).map(b"".join)


@pytest.mark.thorough
@settings(
    max_examples=300,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(content=MAILS, envelope=st.none() | MAILS)
def test_any_bytes_can_be_shown_as_a_mail(
    tmp_path: Path, content: bytes, envelope: bytes | None
) -> None:
    caught(tmp_path, content, envelope=envelope)
