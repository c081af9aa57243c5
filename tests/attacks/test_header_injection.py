"""Line breaks, control characters, surrogates and encoded-words in values that become headers.

The service refuses subjects, addresses and file names with such characters with 422, or with 400
if they break the lines of the request itself. A file name that is only misleading is replaced by
"upload" and its suffix, because clients such as .NET send encoded-words. The names of the headers,
both in the mail and in the download, are always the same fixed set.
"""

import json
import re
import smtplib
from collections.abc import Callable
from datetime import UTC, datetime
from email import message_from_bytes
from email.policy import default
from itertools import product
from urllib.parse import quote

import httpx2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.mail import message
from tests.support.forms import file_part, form_of, part
from tests.support.mails import RECIPIENT, SENDER
from tests.support.target import JSON, MARK, NOTIFICATION, Target
from tests.support.torture import Tried, form
from tests.support.wire import say

EVE = "Bcc: eve@example.com"
DANGEROUS = {
    "CR": "\r",
    "LF": "\n",
    "CRLF": "\r\n",
    "a folded line": "\r\n ",
    "an empty line": "\r\n\r\n",
    "U+0085": "\x85",
    "U+2028": "\u2028",
    "U+2029": "\u2029",
    "VT": "\v",
    "FF": "\f",
    "NUL": "\0",
    "DEL": "\x7f",
    "ESC": "\x1b",
    "backspace": "\b",
    "1C": "\x1c",
    "1D": "\x1d",
    "1E": "\x1e",
    "1F": "\x1f",
    "U+009F": "\x9f",
    "U+202E": "\u202e",
    "U+2066": "\u2066",
    "the first half of a surrogate pair": "\ud800",
    "the second half of a surrogate pair": "\udfff",
    "an encoded-word in Q": "=?utf-8?q?Bcc=3A_eve=40example.com?=",
    "an encoded-word in B": "=?UTF-8?B?QmNjOiBldmVAZXhhbXBsZS5jb20=?=",
    "an encoded-word that holds CRLF": "=?iso-8859-1?Q?=0D=0ABcc:_eve=40example.com?=",
    "an encoded-word in a language": "=?us-ascii*en?Q?Bcc:?=",
    "an empty encoded-word": "=?utf-8?q??=",
}
NOT_SHOWN = {  # as file names, because they could mislead a reader; they break no header
    "\u202e",
    "\u2066",
    *(text for name, text in DANGEROUS.items() if "encoded-word" in name),
}
PLACES = (MARK + "{}", "{}" + EVE, MARK + "{}" + EVE)

HEADERS = [
    *("From", "To", "Subject", "Message-ID", "Date", "Auto-Submitted"),
    *("MIME-Version", "Content-Type"),
]
OF_A_PART = {"Content-Type", "Content-Transfer-Encoding"}
OF_A_DOWNLOAD = {
    "accept-ranges",
    "content-disposition",
    "content-length",
    "content-security-policy",
    "content-type",
    "date",
    "etag",
    "x-content-type-options",
    "x-request-id",
}


def as_subject(target: Target, text: str) -> httpx2.Response:
    return target.post(NOTIFICATION, content=json.dumps({"subject": text}), headers=JSON)


def as_subject_in_raw_bytes(target: Target, text: str) -> httpx2.Response:
    """Send the text without JSON's escapes: then a control character is no valid JSON."""
    body = json.dumps({"subject": "?"}).replace("?", text).encode("utf-8", "surrogatepass")
    return target.post(NOTIFICATION, content=body, headers=JSON)


def as_address(target: Target, text: str) -> httpx2.Response:
    address = quote(f"{text}@example.com".encode("utf-8", "surrogatepass"), safe="")
    return target.post(f"/send-email/?email={address}")


def as_file_name(target: Target, text: str) -> httpx2.Response:
    return target.upload(form_of(file_part(text.encode("utf-8", "surrogatepass"))))


FIELDS: dict[Callable[[Target, str], httpx2.Response], str] = {
    as_subject: "/subject",
    as_subject_in_raw_bytes: "/subject",
    as_address: "/email",
    as_file_name: "/file",
}


@pytest.mark.usefixtures("leaves_no_traces")
@pytest.mark.parametrize("send", FIELDS, ids=lambda send: send.__name__)
def test_a_value_that_could_begin_a_new_header_is_refused(
    target: Target, send: Callable[[Target, str], httpx2.Response], tried: Tried
) -> None:
    dangerous = list(DANGEROUS.values())
    if send is as_file_name:  # no name can contain CRLF, because it ends the line of the form
        dangerous = [text for text in dangerous if "\r\n" not in text and text not in NOT_SHOWN]
    cases = [place.format(inside) for inside, place in product(dangerous, PLACES)]
    named = 0
    for text in cases:
        problem = target.refused(send(target, text), 422, 400)
        if problem["status"] == 422:  # with 400, the body is no valid JSON or form
            assert [error["pointer"] for error in problem["errors"]] == [FIELDS[send]]
            named += 1
    assert named >= 20
    tried(f"{len(cases)} injections {send.__name__.replace('_', ' ')}", "all refused, 0 queued")


@pytest.mark.usefixtures("leaves_no_traces")
def test_an_extended_file_name_that_could_begin_a_new_header_is_refused(target: Target) -> None:
    for inside in DANGEROUS.values():
        if inside not in NOT_SHOWN and not re.search("[\ud800-\udfff]", inside):
            name = f"filename=a; filename*=UTF-8''{MARK}{quote(inside, safe='')}".encode()
            problem = target.refused(target.upload(form_of(part(b"name=file; " + name))), 422)
            assert [error["pointer"] for error in problem["errors"]] == ["/file"]


# Accepted values


@pytest.mark.parametrize("inside", sorted(NOT_SHOWN))
def test_a_misleading_file_name_is_replaced(target: Target, inside: str) -> None:
    for place in PLACES:
        queued = as_file_name(target, place.format(inside)).raise_for_status().json()
        assert queued["upload"]["filename"] in {"upload", "upload.com"}  # as in eve@example.com
        target.service.wait_for(queued["id"])
        headers = target.service.get(f"/uploads/{queued['upload']['id']}/content").headers
        assert headers["content-disposition"].startswith('attachment; filename="upload')
        assert MARK not in str(headers)


SUBJECTS = st.text(st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp"]), max_size=200)
HARMLESS = [
    EVE,
    "",
    " ",
    "=?utf-8?q?Bcc=3A_eve=40example.com",
    "what=? is =?this",
    "%0D%0A" + EVE,
    "\\r\\n" + EVE,
    "&#13;&#10;" + EVE,
    "é" * 200,
    "😀" * 200,
    "x " * 100,
    " x" * 100,
]


@settings(max_examples=form(25, 1_000), deadline=None)
@given(subject=SUBJECTS)
def test_any_subject_leads_to_the_same_fixed_set_of_headers(target: Target, subject: str) -> None:
    response = as_subject(target, subject)
    if response.status_code == 202:
        assert_headers(target.mail_of(response).content)
    else:
        target.refused(response, 422)


def test_a_subject_that_only_looks_dangerous_is_sent_unchanged(
    target: Target, tried: Tried
) -> None:
    for subject in HARMLESS:
        content = target.mail_of(as_subject(target, subject)).content
        assert_headers(content)
        assert message_from_bytes(content, policy=default)["Subject"] == subject
    tried(f"{len(HARMLESS)} harmless subjects", "sent unchanged, 0 other headers")


def assert_headers(mail: bytes) -> None:
    """Check the headers line by line, because a mail parser may split headers differently."""
    head, _, body = mail.partition(b"\r\n\r\n")
    assert names_in(head) == HEADERS
    assert b"\r\n\r\n" in body
    for one in body.split(b"--=_")[1:-1]:
        head = one.partition(b"\r\n\r\n")[0].partition(b"\r\n")[2]
        assert set(names_in(head)) - {"MIME-Version"} == OF_A_PART


def names_in(head: bytes) -> list[str]:
    """Return the names of a mail's headers, and split at every character that may end a line."""
    lines = re.split(rb"\r\n|[\r\n\v\f\x1c-\x1e\x85]", head)
    return [line.partition(b":")[0].decode("latin-1") for line in lines if line[:1] not in b" \t"]


@pytest.mark.parametrize(
    "name",
    ["a.txt", "%0D%0ASet-Cookie: a=b", "a; filename=b", "a\\r\\nb", "é😀", "x" * 255, "'a'", EVE],
)
def test_any_file_name_leads_to_the_same_fixed_set_of_download_headers(
    target: Target, name: str
) -> None:
    upload = as_file_name(target, name).raise_for_status().json()
    target.service.wait_for(upload["id"])
    headers = target.service.get(f"/uploads/{upload['upload']['id']}/content").headers
    assert set(headers) == OF_A_DOWNLOAD


@pytest.mark.parametrize(
    "request_id",
    [
        b"a b",
        b"a\tb",
        b"a\x1b[2J",
        b"\x85",
        "\u2028".encode(),
        b"\xff",
        b"x" * 129,
        b'"',
        b"=?a?q?b?=",
    ],
)
def test_an_invalid_request_id_is_replaced(target: Target, request_id: bytes) -> None:
    """It is the only header of the request that the response repeats."""
    said = say(
        target.service.port,
        b"GET /tasks HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nX-Request-ID: %b\r\n\r\n"
        % request_id,
    )
    (response,) = said.responses
    if response.status == 400:  # the server does not accept it as an HTTP header
        assert "x-request-id" not in response.headers
    else:
        assert len(response.headers["x-request-id"]) == 32


# Negative controls


def composed_by_hand(subject: str) -> bytes:
    """Compose a mail with an f-string."""
    return f"From: {SENDER}\r\nTo: {RECIPIENT}\r\nSubject: {subject}\r\n\r\nHello".encode()


def composed_without_our_check(subject: str) -> bytes:
    """Compose a mail as the service does, but with a `header_text` that accepts every text.

    Recent releases of Python, and Debian's 3.11.2, check headers again when they write them. This
    function switches that check off, because the test is about the service's own check.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(message, "header_text", lambda value: value)
        patch.setattr(message._HeadersAsGiven, "verify_generated_headers", False, raising=False)
        mail = message.compose(
            sender=SENDER,
            recipient=RECIPIENT,
            subject=subject,
            text="Hello",
            message_id="<task-1@example.com>",
            date=datetime(2025, 1, 2, tzinfo=UTC),
        )
        return mail.as_bytes()


@pytest.mark.parametrize("compose", [composed_by_hand, composed_without_our_check])
def test_control_without_the_check_a_new_header_is_injected(
    target: Target, compose: Callable[[str], bytes], tried: Tried
) -> None:
    injected = 0
    for inside in ("\r", "\n", "\r\n"):
        with smtplib.SMTP("127.0.0.1", target.smtp_server.port, timeout=5) as client:
            client.sendmail(SENDER, RECIPIENT, compose(f"Hello{inside}{EVE}"))
        content = target.smtp_server.received[-1].content
        injected += "Bcc" in names_in(content.partition(b"\r\n\r\n")[0])
    tried(f"3 injections into a mail {compose.__name__.replace('_', ' ')}", f"{injected} Bcc")
    assert injected == 3
