"""The inbox: it shows every mail that the catcher received, and needs little memory for it."""

import os
import smtplib
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from app.main import create_app
from tests.api.requests import problem_of
from tests.support.measures import Peak
from tests.support.service import PATIENCE, Service, settings_in

MB = 1_000_000
ODD = {
    "message_id": b"Message-ID: <>\r\nSubject: odd\r\n\r\nhi",
    "quote": b'To: ada <ada@example.com>, "\r\nSubject: odd\r\n\r\nhi',
    "charset": b"Content-Type: text/html; charset=undefined\r\nSubject: odd\r\n\r\nhi",
    "surrogate": b"Content-Type: text/html; charset=utf-7\r\nSubject: odd\r\n\r\n+2AA-",
    "nul": b"Subject: odd\x00\r\n\r\n\x00",
    "nested": b"Subject: odd\r\n"
    + b"".join(
        b"Content-Type: multipart/mixed; boundary=b%d\r\n\r\n--b%d\r\n" % (n, n)
        for n in range(1200)
    ),
    "empty": b"",
}


def deliver(port: int, mail: bytes, recipient: bytes = b"<ada@example.com>") -> None:
    """Send a mail to the catcher; the mail and the recipient can be any bytes."""
    with smtplib.SMTP("127.0.0.1", port, timeout=PATIENCE) as smtp:
        smtp.ehlo()
        smtp.mail("bob@example.com")
        assert smtp.sock is not None
        smtp.sock.sendall(b"RCPT TO:" + recipient + b"\r\n")
        assert smtp.getreply()[0] == 250
        assert smtp.data(mail)[0] == 250


@pytest.mark.parametrize("mail", ODD.values(), ids=ODD)
def test_a_malformed_mail_does_not_hide_other_mails(tmp_path: Path, mail: bytes) -> None:
    settings = settings_in(tmp_path)
    with TestClient(create_app(settings)) as client:
        deliver(settings.smtp_port, mail, b"<ad\xe9@example.com>")
        deliver(settings.smtp_port, b"Subject: the other\r\n\r\nhi")
        listed = client.get("/inbox")
        assert listed.status_code == 200
        assert "the other" in listed.text
        assert "ad\N{REPLACEMENT CHARACTER}@example.com" in listed.text
        (tmp_path / "inbox" / "1735815845000000000-0123abcd.eml").write_bytes(b"X-Envelope: {")
        for path in (tmp_path / "inbox").iterdir():
            shown = client.get(f"/inbox/{path.stem}")
            assert shown.status_code == 200
            if "<iframe" in shown.text:
                assert client.get(f"/inbox/{path.stem}/html").status_code == 200


def test_the_html_of_a_mail_without_html_is_not_found(tmp_path: Path) -> None:
    settings = settings_in(tmp_path)
    with TestClient(create_app(settings)) as client:
        deliver(settings.smtp_port, b"Subject: x\r\n\r\nhi")
        (path,) = (tmp_path / "inbox").iterdir()
        problem_of(client.get(f"/inbox/{path.stem}/html"), 404)
        problem_of(client.get("/inbox/1735815845000000000-0123abcd"), 404)


def test_mails_with_large_attachments_need_little_memory_to_list_and_to_show(
    tmp_path: Path,
) -> None:
    """Each mail has 64 MB; the service may grow by 32 MB."""
    with Service(tmp_path, worker_concurrency=0) as service:
        assert service.get("/inbox").status_code == 200
        line = b'X-Envelope: {"sender": "a@example.com", "recipients": []}\r\n'
        text = (
            b"Subject: large\r\nContent-Type: multipart/mixed; boundary=b\r\n\r\n--b\r\n\r\nhi\r\n"
        )
        attachment = b"--b\r\nContent-Disposition: attachment\r\n\r\n"
        for number in range(5):
            path = tmp_path / "inbox" / f"{1735815845000000000 + number}-0123abcd.eml"
            path.write_bytes(line + text + attachment)
            os.truncate(path, 64 * MB)
        peak = Peak(service.pid)
        assert service.get("/inbox").text.count(">large</a>") == 5
        shown = service.get(f"/inbox/{path.stem}").text
        assert "<pre>hi</pre>" in shown
        assert f"This mail has {64 * MB - len(line)} bytes." in shown
        assert peak.grown <= 32
