"""A real Postfix accepts the service's mail. It greylists, refuses, and forbids bare newlines."""

import asyncio
from collections.abc import Iterator
from datetime import datetime
from email import message_from_bytes
from email.message import EmailMessage
from email.policy import default
from smtplib import SMTP

import pytest

from app.mail.message import compose
from app.mail.smtp import Mailer
from tests.support.mails import SENDER
from tests.support.postfix import GREYLISTED, MAX_MESSAGE_BYTES, Postfix
from tests.support.service import Service

ADA = "ada@example.org"
BODIES = {
    "a lone CR": "a\rb\r\rc\r",
    "a lone LF": "a\nb\n\nc\n",
    "all line ends": "a\r\nb\nc\rd\n\re",
    "dots on lines": ".\n..\n...\n.a\n",
    "a dot between lone LFs": "a\n.\nMAIL FROM:<eve@example.org>\nRCPT TO:<ada@example.org>\n",
    "a dot between lone CRs": "a\r.\rMAIL FROM:<eve@example.org>\r",
    "a dot between all kinds": "a\r\n.\rb\n.\r\nc\r.\r\nd\r\n.\n",
    "an end of mail": "a\r\n.\r\nQUIT\r\n",
    "a line of 3,000 characters": "x" * 3000,
    "dots in a line of 3,000": "." * 3000,
    "3,000 letters with accents": "é" * 3000,
    "nothing": "",
}


@pytest.fixture(scope="module")
def service(postfix: Postfix, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """The service, with Postfix as its SMTP server."""
    directory = tmp_path_factory.mktemp("service")
    with Service(directory, catcher=False, smtp_port=postfix.port, retry_base_seconds=1) as service:
        yield service


def test_a_greylisted_mail_is_tried_again_and_delivered_once(
    service: Service, postfix: Postfix
) -> None:
    """Postfix defers the first mail to this recipient with a 450."""
    task = service.post(f"/send-notification/{GREYLISTED}").json()

    error = service.wait_for(task["id"], "retrying")["error"]
    assert error["smtp_code"] == 450
    assert "Greylisted" in error["detail"]
    assert service.wait_for(task["id"])["attempts"] == 2
    message_id = f"<{task['id']}@example.com>"
    postfix.wait_for("greta", message_id)
    assert len(postfix.delivered("greta", message_id)) == 1


@pytest.mark.parametrize(
    ("recipient", "message", "code"),
    [("nobody@example.org", "", 550), (ADA, "a line\n" * (MAX_MESSAGE_BYTES // 7), 552)],
    ids=["an unknown recipient", "a mail that is too large"],
)
def test_a_mail_that_postfix_refuses_fails_at_once_with_the_code(
    service: Service, recipient: str, message: str, code: int
) -> None:
    task = service.post(f"/send-notification/{recipient}", json={"message": message}).json()
    failed = service.wait_for(task["id"], "failed")

    assert failed["attempts"] == 1
    assert failed["error"]["smtp_code"] == code


def test_the_text_of_a_request_arrives_unchanged_in_the_mailbox(
    service: Service, postfix: Postfix
) -> None:
    """The text combines line ends, dots, long lines and accents."""
    message = "".join(BODIES.values())
    answer = service.post(f"/send-notification/{ADA}", json={"message": message})
    result = service.wait_for(answer.json()["id"])["result"]
    mail = message_from_bytes(postfix.wait_for("ada", result["message_id"]), policy=default)
    text = mail.get_body(("plain",))

    assert text is not None
    assert text.get_content().startswith("\n".join(message.splitlines()))


@pytest.mark.anyio
async def test_postfix_delivers_every_body_byte_for_byte_as_it_was_sent(postfix: Postfix) -> None:
    """Both composed mails, and raw mails with lines that are neither folded nor encoded."""
    mailer = Mailer(host="127.0.0.1", port=postfix.port)
    for number, body in enumerate(BODIES.values()):
        for mail in (composed(f"<built-{number}@test>", body), raw(f"<raw-{number}@test>", body)):
            await mailer.send(mail, sender=SENDER, recipient=ADA)
            stored = await asyncio.to_thread(postfix.wait_for, "ada", mail["Message-ID"])
            sent = b"".join(line + b"\n" for line in mail.as_bytes().splitlines())
            received = stored.partition(b"From: ")  # Postfix's trace headers, then the mail
            assert b"".join(received[1:]) == sent, body[:40]
    await mailer.close()


def composed(message_id: str, body: str) -> EmailMessage:
    """Compose a mail as the service does."""
    return compose(
        sender=SENDER,
        recipient=ADA,
        subject="Hello",
        text=body,
        html=body,
        message_id=message_id,
        date=datetime.fromisoformat("2025-01-02T03:04:05Z"),
    )


def raw(message_id: str, body: str) -> EmailMessage:
    """Build a mail with the body as it is, in ASCII."""
    mail = EmailMessage()
    mail["From"] = SENDER
    mail["Message-ID"] = message_id
    mail.set_payload(body.replace("é", "e"))
    return mail


def test_control_postfix_refuses_a_bare_newline(postfix: Postfix) -> None:
    """So the tests above would fail if the service sent a bare LF."""
    with SMTP("127.0.0.1", postfix.port) as client:
        client.ehlo()
        client.mail(SENDER)
        client.rcpt(ADA)
        client.docmd("DATA")
        client.send(b"Subject: smuggled\r\n\r\na\n.\nb\r\n.\r\n")
        code, text = client.getreply()

    assert code == 550
    assert b"bare <LF>" in text
