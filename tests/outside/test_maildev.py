"""maildev accepts the service's mail, and shows it as it was sent."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from tests.support.service import PATIENCE, Service, free_port, until, wait_until_open

TEXT = "It is done.\n.\n..\nGrüße, 🎉\n"


@pytest.fixture
def ports(maildev: str, tmp_path: Path) -> Iterator[tuple[int, int]]:
    """The SMTP and HTTP ports of a running maildev."""
    smtp, web = free_port(), free_port()
    command = [maildev, "--ip", "127.0.0.1", "--web-ip", "127.0.0.1"]
    command += ["--smtp", str(smtp), "--web", str(web), "--mail-directory", str(tmp_path / "mail")]
    process = subprocess.Popen(command)
    try:
        wait_until_open(smtp)
        wait_until_open(web)
        yield smtp, web
    finally:
        process.terminate()
        process.wait()


def test_a_mail_is_shown_by_maildev_as_it_was_sent(ports: tuple[int, int], tmp_path: Path) -> None:
    smtp, web = ports
    with Service(tmp_path / "service", catcher=False, smtp_port=smtp) as service:
        answer = service.post(
            "/send-notification/ada@example.com",
            json={"subject": "Grüße aus der Ferne 🎉", "message": TEXT},
        )
        done = service.wait_for(answer.json()["id"])

    url = f"http://127.0.0.1:{web}/email"
    until(lambda: httpx2.get(url).json(), within=PATIENCE)  # it accepts a mail before it shows it
    [mail] = httpx2.get(url).json()
    assert mail["subject"] == "Grüße aus der Ferne 🎉"
    assert mail["text"].startswith(TEXT)
    assert f"<{mail['messageId']}>" == done["result"]["message_id"]
    assert mail["envelope"]["to"][0]["address"] == "ada@example.com"
