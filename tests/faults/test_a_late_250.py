"""The server answers the final dot later than any other step may take: in the long form after 45 s.

The answer has a timeout of its own, ten minutes (RFC 5321, 4.5.3.2.6), for whoever gives up early
sends the mail again although it was taken (RFC 1047). So there is exactly one copy.
"""

from pathlib import Path

from fastapi.testclient import TestClient

from app.main import create_app
from tests.support.service import PATIENCE, settings_in, until, wait_for
from tests.support.smtp_server import SmtpServer
from tests.support.torture import Tried, form

STEP = form(0.7, 30.0)
LATE = form(1.4, 45.0)


def test_a_mail_whose_250_comes_late_is_sent_once(
    tmp_path: Path, smtp_server: SmtpServer, tried: Tried
) -> None:
    """In the long form with the default timeouts, and past the worker's lease."""
    send_to_a_late_server(tmp_path, smtp_server, "succeeded", data_timeout=600)

    assert len(smtp_server.received) == 1
    tried(f"a 250 after {LATE} s, with {STEP} s for other steps", "1 copy")


def test_control_with_the_timeout_of_other_steps_there_are_two_copies(
    tmp_path: Path, smtp_server: SmtpServer, tried: Tried
) -> None:
    """At least, because the mail is tried again although it was taken."""
    send_to_a_late_server(tmp_path, smtp_server, "retrying", data_timeout=STEP)

    first, second, *_ = smtp_server.received
    assert first == second
    tried(f"the same, with {STEP} s for the 250", "2 copies")


def send_to_a_late_server(
    directory: Path, server: SmtpServer, status: str, *, data_timeout: float
) -> None:
    """Send one mail, and wait until its first or its second attempt has ended with this status."""
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
