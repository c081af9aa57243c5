"""A sample mail, functions that send it, and fixtures for an SMTP server and its mailers."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from email.message import EmailMessage

import pytest

from app.mail.message import compose, message_id
from app.mail.replies import MailError
from app.mail.smtp import Mailer
from tests.support.service import PATIENCE
from tests.support.smtp_server import SmtpServer

SENDER = "notifications@example.com"
RECIPIENT = "ada@example.org"
TIMEOUT = 0.3  # seconds for each step, in tests with a slow server
SHORT_TIMEOUTS = {"timeout": TIMEOUT, "data_timeout": TIMEOUT}
STAGES = ["connect", "ehlo", "mail", "rcpt", "data", "dot"]

MakeMailer = Callable[..., Mailer]


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


async def failure(sending: Awaitable[str]) -> MailError:
    with pytest.raises(MailError) as raised:
        await sending
    return raised.value


@pytest.fixture(params=["pipelining", "one by one"])
async def server(request: pytest.FixtureRequest) -> AsyncIterator[SmtpServer]:
    """An SMTP server that accepts every mail by default, with and without PIPELINING."""
    async with SmtpServer() as smtp_server:
        if request.param == "one by one":
            smtp_server.always["ehlo"] = "250-test\r\n250 AUTH PLAIN"
        yield smtp_server


@pytest.fixture
async def mailer_to() -> AsyncIterator[MakeMailer]:
    """A function that makes a mailer to a server. The fixture closes it after the test."""
    async with AsyncExitStack() as closing:

        def make(server: SmtpServer, **settings: object) -> Mailer:
            known: dict[str, object] = {
                "host": "127.0.0.1",
                "port": server.port,
                "timeout": PATIENCE,  # long, so that a slow answer on a busy machine is no timeout
                "data_timeout": PATIENCE,
                "connections": 2,
            }
            mailer = Mailer(**(known | settings))  # type: ignore[arg-type]
            closing.push_async_callback(mailer.close)
            return mailer

        yield make
