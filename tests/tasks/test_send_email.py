"""send_email applies every rule again, because its arguments may be older than the rules."""

from types import SimpleNamespace
from typing import cast

import pytest

from afterward.errors import PermanentError
from app.mail.recipients import Recipients
from app.mail.smtp import Mailer
from app.tasks.mail import send_email
from app.tasks.tools import Context
from tests.support.mails import RECIPIENT, SENDER, MakeMailer, mailer_to, server
from tests.support.smtp_server import SmtpServer

__all__ = ["mailer_to", "server"]

pytestmark = pytest.mark.anyio


def context_with(mailer: Mailer, *allowed: str) -> Context:
    """Make a context with the tools and the fields of a task that send_email reads."""
    tools = SimpleNamespace(mailer=mailer, mail_from=SENDER, recipients=Recipients(allowed))
    task = SimpleNamespace(id="task-1", created_at=1_750_000_000.0)
    return cast("Context", SimpleNamespace(tools=tools, task=task))


async def test_the_stored_recipient_gets_the_mail(
    server: SmtpServer, mailer_to: MakeMailer
) -> None:
    context = context_with(mailer_to(server), "*@example.org")
    result = await send_email(context, recipient=RECIPIENT, subject="Hello", message="It is done.")
    assert result == {"message_id": "<task-1@example.com>", "reply": "250 2.0.0 Ok"}
    (received,) = server.received
    assert received.recipients == (RECIPIENT,)
    assert f"To: {RECIPIENT}\r\n".encode() in received.content


@pytest.mark.parametrize(
    "stored",
    [
        {"recipient": "ada lovelace@example.org"},
        {"recipient": "ädä@example.org"},
        {"recipient": "a@example.org> <b@example.org"},
        {"recipient": "a@example.org>\r\nRCPT TO:<b@example.org"},
        {"subject": "Hello\r\nBcc: eve@example.net"},
        {"message": "\0"},
    ],
)
async def test_arguments_that_break_a_rule_fail_at_once(
    server: SmtpServer, mailer_to: MakeMailer, stored: dict[str, str]
) -> None:
    arguments = {"recipient": RECIPIENT, "subject": "Hello", "message": "It is done."} | stored
    with pytest.raises(PermanentError):
        await send_email(context_with(mailer_to(server)), **arguments)
    assert not server.commands


async def test_a_recipient_that_is_off_the_list_by_now_fails_at_once(
    server: SmtpServer, mailer_to: MakeMailer
) -> None:
    context = context_with(mailer_to(server), "*@example.com")
    with pytest.raises(PermanentError, match="may not be sent to this address"):
        await send_email(context, recipient=RECIPIENT, subject="Hello", message="It is done.")
    assert not server.commands
