"""The catcher shows as much of a mail as it can parse, for any bytes."""

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from app.mail import caught as caught_module
from app.mail.caught import Caught, first_line, read, summarise

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
        (b"Subject: x\r\nContent-Transfer-Encoding: base64\r\n\r\n=aGk", "x", "hi"),
        (b"Subject: x\r\nContent-Transfer-Encoding: base64\r\n\r\na", "x", "a"),
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
    assert mail.raw == content
    assert mail.size == len(content)
    assert not mail.is_cut


@pytest.mark.parametrize("depth", [31, 1200])
def test_a_mail_with_too_deeply_nested_parts_is_shown_as_its_bytes(
    tmp_path: Path, depth: int
) -> None:
    mail = caught(tmp_path, nested(depth))
    assert mail.subject == "x"
    assert mail.text == nested(depth).decode().replace("\r\n", "\n")


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
    assert mail.attachments == 2


def test_a_mail_that_the_standard_library_cannot_parse_is_shown_as_its_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: bytes) -> None:
        raise AttributeError

    monkeypatch.setattr(caught_module, "message_from_bytes", fail)
    mail = caught(tmp_path, HELLO)
    assert (mail.subject, mail.text) == ("x", "Subject: x\n\nhi")


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


def test_only_the_beginning_of_a_large_mail_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(caught_module, "MOST_SHOWN", 100)
    content = HELLO + b"x" * 1000
    mail = caught(tmp_path, content)
    assert mail.is_cut
    assert (mail.size, mail.raw) == (len(content), content[:100])
    assert mail.text == "hi" + "x" * (100 - len(HELLO))


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
