"""The SMTP server replies to the final dot later than the timeout of every other step.

This reply has its own timeout of ten minutes (RFC 5321, section 4.5.3.2.6). A client that gives up
earlier sends the mail again although the server accepted it (RFC 1047). So with that timeout
exactly one copy arrives. In the long form the reply comes after 45 s.
"""

from pathlib import Path

from fastapi.testclient import TestClient

from app.main import create_app
from tests.support.service import PATIENCE, settings_in, until, wait_for
from tests.support.smtp_server import SmtpServer
from tests.support.torture import Tried, form

STEP = form(0.7, 30.0)
LATE = form(1.4, 45.0)


def test_a_mail_with_a_late_250_is_sent_once(
    tmp_path: Path, smtp_server: SmtpServer, tried: Tried
) -> None:
    """The long form has the default timeouts, and the reply comes after the lease would expire."""
    send_to_a_server_with_a_late_250(tmp_path, smtp_server, "succeeded", data_timeout=600)

    assert len(smtp_server.received) == 1
    tried(f"a 250 after {LATE} s, with {STEP} s for other steps", "1 copy")


def test_control_with_the_timeout_of_the_other_steps_the_mail_is_sent_twice(
    tmp_path: Path, smtp_server: SmtpServer, tried: Tried
) -> None:
    """The mailer gives up before the 250, so the mail is sent again although it was accepted."""
    send_to_a_server_with_a_late_250(tmp_path, smtp_server, "retrying", data_timeout=STEP)

    first, second, *_ = smtp_server.received
    assert first == second
    tried(f"the same, with {STEP} s for the 250", "2 copies")


def send_to_a_server_with_a_late_250(
    directory: Path, server: SmtpServer, status: str, *, data_timeout: float
) -> None:
    """Send a mail, and wait until its first or second attempt has ended with this status."""
    server.delay["dot"] = LATE
    settings = settings_in(
        directory,
        catcher=False,
        smtp_port=server.port,
        smtp_timeout=STEP,
        smtp_data_timeout=data_timeout,
    )
    with TestClient(create_app(settings)) as client:
        task = client.post("/send-notification/ada@example.com").json()
        if status == "retrying":
            until(lambda: len(server.received) > 1, within=2 * LATE + PATIENCE)
        wait_for(client, task["id"], status, at_most=2 * LATE + PATIENCE)
