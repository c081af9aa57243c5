"""A mail to send, and the sending of it."""

from datetime import UTC, datetime
from email.message import EmailMessage

from app.mail.message import compose, message_id
from app.mail.smtp import Mailer

SENDER = "notifications@example.com"
RECIPIENT = "ada@example.org"
TIMEOUT = 0.3  # seconds that a step may take where a server is slow on purpose


def a_mail(task_id: str = "task-1") -> EmailMessage:
    return compose(
        sender=SENDER,
        recipient=RECIPIENT,
        subject="Hello",
        text="Dear Ada,\n.\n..\nyours",
        message_id=message_id(task_id, SENDER),
        date=datetime(2025, 1, 2, 3, 4, 5, tzinfo=UTC),
    )


async def send(mailer: Mailer, task_id: str = "task-1") -> str:
    return await mailer.send(a_mail(task_id), sender=SENDER, recipient=RECIPIENT)
