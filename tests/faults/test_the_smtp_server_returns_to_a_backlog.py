"""The SMTP server is down while mail is queued, and returns.

The backlog causes no stampede: at most SMTP_CONNECTIONS connections are open at the same time, and
the mailer reuses each connection for many mails.
"""

import asyncio
from pathlib import Path

import aiosmtplib
import pytest

from tests.support.mails import RECIPIENT, SENDER, a_mail
from tests.support.service import PATIENCE, Json, Service, until
from tests.support.smtp_server import SmtpServer, in_a_thread
from tests.support.torture import Tried, form

MAILS = form(50, 1000)
CONNECTIONS = 3
PATIENT = PATIENCE + MAILS / 20  # seconds
HANDLING = 0.005  # seconds that the server takes for a mail, so that deliveries overlap


def test_a_backlog_is_delivered_over_a_few_connections(tmp_path: Path, tried: Tried) -> None:
    """Ten tasks run at the same time, and share three connections."""
    server = SmtpServer()
    server.delay["dot"] = HANDLING
    with (
        in_a_thread(server) as portal,
        Service(
            tmp_path,
            catcher=False,
            smtp_port=server.port,
            smtp_connections=CONNECTIONS,
            retry_max_seconds=1,
        ) as service,
    ):
        portal.call(server.stop)
        for _ in range(MAILS):
            service.post("/send-notification/ada@example.com").raise_for_status()
        until(lambda: tasks(service, "retrying"), within=PATIENT)  # a mail has met the outage
        portal.call(server.start)
        until(lambda: len(server.received) >= MAILS, within=PATIENT)

    assert len({mail.content for mail in server.received}) == len(server.received) == MAILS
    assert server.open_most <= CONNECTIONS
    assert server.open_total <= CONNECTIONS
    tried(
        f"{MAILS} mails waited, {CONNECTIONS} connections allowed",
        f"{server.open_most} at once, {server.open_total} in all",
    )


@pytest.mark.anyio
async def test_control_a_connection_for_each_mail_is_a_stampede(
    server: SmtpServer, tried: Tried
) -> None:
    """A simple sender starts all waiting mails at the same time."""
    server.delay["dot"] = HANDLING
    await asyncio.gather(
        *(
            aiosmtplib.send(
                a_mail(f"task-{number}"),
                sender=SENDER,
                recipients=[RECIPIENT],
                hostname="127.0.0.1",
                port=server.port,
            )
            for number in range(100)
        )
    )
    assert server.open_most > CONNECTIONS
    assert server.open_total == 100
    tried(
        "100 mails, each with aiosmtplib.send",
        f"{server.open_most} at once, {server.open_total} in all",
    )


def tasks(service: Service, status: str) -> list[Json]:
    """Return the newest tasks with this status."""
    found: list[Json] = service.get("/tasks", params={"status": status}).json()["data"]
    return found
