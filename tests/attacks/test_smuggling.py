"""Mail texts with the end of a mail, or of a line, in every form that a server may accept.

On the wire, a mail has no bare CR or LF, no line of more than 998 characters, and a single end. The
text arrives unchanged except for its line ends: a line end is added, and each CR, LF or CRLF
becomes a line end. U+2028 and U+2029 are no line ends. The service refuses control characters other
than tab, CR and LF.
"""

import re
import smtplib
from email import message_from_bytes
from email.mime.text import MIMEText
from email.policy import default
from itertools import product
from pathlib import Path

import httpx2
import pytest
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st

from app.mail import smtp
from app.main import create_app
from tests.support.mails import RECIPIENT, SENDER
from tests.support.service import settings_in, wait_for
from tests.support.smtp_server import Received
from tests.support.target import MARK, NOTIFICATION, Target
from tests.support.torture import Tried, form

BREAKS = {"CR": "\r", "LF": "\n", "CRLF": "\r\n"}
ENDS = {f"{a} . {b}": BREAKS[a] + "." + BREAKS[b] for a, b in product(BREAKS, BREAKS)}
SECOND_MAIL = "MAIL FROM:<eve@example.com>\r\nRCPT TO:<eve@example.com>\r\nDATA\r\nEve\r\n.\r\n"
BODIES = {
    **{f"{name}, then a second mail": f"a{end}{SECOND_MAIL}b" for name, end in ENDS.items()},
    **{f"{name} at the beginning": f"{end[1:]}b" for name, end in ENDS.items()},
    **{f"{name} at the end": f"a{end}" for name, end in ENDS.items()},
    "a bare LF": "a\nb",
    "a bare CR": "a\rb",
    "a CR at the end": "a\r",
    "LF CR": "a\n\rb",
    "CR CR LF": "a\r\r\nb",
    "only line ends": "\r\r\n\n",
    "only a dot": ".",
    "two dots": "a\n..\nb",
    "an encoded end": "a=0D=0A.=0D=0Ab",
    "an end in base64": "YQ0KLg0KYg==",
    "U+2028 . U+2029": "a\u2028.\u2029b",
    "a line of 3,000 characters": "x" * 3_000,
    "a line of 3,000 characters that ends in a dot": "x" * 2_999 + "\n.\n",
    "a line of 3,000 that are no ASCII": "é" * 3_000,
    "a line of 100,000 dots": "." * 100_000,
    "spaces at the ends of lines": "a \n \t\n b ",
    "a part of its own": "\n--=_0123456789abcdef01234567--\n\nb",
}


def send(target: Target, text: str) -> httpx2.Response:
    return target.post(NOTIFICATION, json={"message": text})


@pytest.mark.parametrize("text", BODIES.values(), ids=BODIES)
def test_a_text_arrives_unchanged_in_a_single_mail(target: Target, text: str) -> None:
    before = len(target.smtp_server.received)
    mail = target.mail_of(send(target, text))
    assert target.smtp_server.received[before:] == [mail]
    assert_sound(mail)
    assert text_of(mail) == with_plain_line_ends(text)


TEXTS = st.text(
    st.sampled_from("\r\n\t .-=a\u2028é")
    | st.characters(exclude_categories=["Cc", "Cs"])
    | st.sampled_from("\r\n."),
    max_size=200,
)


@settings(max_examples=form(25, 2_000), deadline=None)
@given(text=TEXTS)
def test_any_text_arrives_unchanged_in_a_single_mail(target: Target, text: str) -> None:
    mail = target.mail_of(send(target, text))
    assert_sound(mail)
    assert text_of(mail) == with_plain_line_ends(text)


def test_report_the_number_of_texts(tried: Tried) -> None:
    tried(f"{len(BODIES)} texts", "a mail each, 0 bare CR or LF, each text unchanged")


@pytest.mark.usefixtures("leaves_no_traces")
@pytest.mark.parametrize("inside", ["\0", "\x1b[2J", "\v", "\f", "\x1c", "\x1a", "\x7f", "\x85"])
def test_a_text_with_control_characters_is_refused(target: Target, inside: str) -> None:
    (error,) = target.refused(send(target, MARK + inside), 422)["errors"]
    assert error["pointer"] == "/message"


def assert_sound(mail: Received) -> None:
    assert not bare_line_ends(mail.content)
    assert longest_line(mail.content) <= 998
    assert len(mails_in(mail.content)) == 1


def bare_line_ends(content: bytes) -> int:
    return len(re.findall(rb"\r(?!\n)|(?<!\r)\n", content))


def longest_line(content: bytes) -> int:
    return max(map(len, re.split(rb"[\r\n]", content)))


def mails_in(content: bytes) -> list[bytes]:
    """Split the content as a careless server would: after each line that is only a dot."""
    return re.split(rb"[\r\n]+\.[\r\n]+", content)


def text_of(mail: Received) -> str:
    content = re.sub(rb"(?m)^\.", b"", mail.content)  # RFC 5321, section 4.5.2
    part = message_from_bytes(content, policy=default).get_body(("plain",))
    assert part is not None
    decoded = part.get_payload(decode=True)
    assert isinstance(decoded, bytes)
    return decoded.decode().replace("\r\n", "\n")


def with_plain_line_ends(text: str) -> str:
    return re.sub("\r\n|\r|\n", "\n", text + "\n")


# Negative controls


def test_control_without_doubled_dots_a_text_becomes_a_second_mail(
    target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tried: Tried
) -> None:
    """In this control, dots are not doubled, and line ends are not changed to CRLF."""
    monkeypatch.setattr(smtp, "_as_smtp_data", lambda content: content + b"\r\n.\r\n")
    port = target.smtp_server.port
    before = len(target.smtp_server.received)
    with TestClient(create_app(settings_in(tmp_path, catcher=False, smtp_port=port))) as client:
        task = client.post(NOTIFICATION, json={"message": f"a\r\n.\r\n{SECOND_MAIL}b"}).json()
        wait_for(client, task["id"])
    mails = target.smtp_server.received[before:]
    tried("a text without doubled dots", f"{len(mails)} mails, the second from {mails[1].sender}")
    assert mails[1].sender == "eve@example.com"


def test_control_the_standard_library_sends_lines_of_any_length(
    target: Target, tried: Tried
) -> None:
    with smtplib.SMTP("127.0.0.1", target.smtp_server.port, timeout=5) as client:
        client.sendmail(SENDER, RECIPIENT, MIMEText("x" * 3_000).as_string())
    longest = longest_line(target.smtp_server.received[-1].content)
    tried("smtplib and MIMEText, a line of 3,000", f"a line of {longest:,} on the wire")
    assert longest > 998
