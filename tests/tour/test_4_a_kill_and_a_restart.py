"""Fourth stop: the process dies. Nothing that was answered 202 is lost."""

import sys
import time
from pathlib import Path

from tests.support.kills import KILLS, kill_under_load
from tests.support.service import Service
from tests.support.smtp_server import SmtpServer

TUTORIAL = (sys.executable, "-m", "tests.support.tutorial")


def test_kill_9_under_load_loses_nothing(tmp_path: Path, smtp_server: SmtpServer) -> None:
    """Sixteen clients send while the service is killed at random instants."""
    with Service(tmp_path, catcher=False, smtp_port=smtp_server.port) as service:
        tally = kill_under_load(service, smtp_server, kills=KILLS)

    print(f"{KILLS} kills, {len(tally.accepted)} accepted, {len(tally.lost)} lost")
    assert len(tally.accepted) > 20 * KILLS
    assert tally.lost == set()
    # At least once: a kill may come between the server's 250 and our note of it.
    copies = sum(tally.delivered.values()) - len(tally.delivered)
    assert copies <= KILLS * 10  # as many as can run at once


def test_the_same_with_plain_background_tasks_loses_mail(
    tmp_path: Path, smtp_server: SmtpServer
) -> None:
    """The negative control: if this loses nothing, the test above proves nothing."""
    smtp_server.delay["dot"] = 0.2  # a server that takes its time, as real ones do
    with Service(tmp_path, command=TUTORIAL, smtp_port=smtp_server.port) as service:
        tally = kill_under_load(service, smtp_server, kills=KILLS)

    print(f"{KILLS} kills, {len(tally.accepted)} accepted, {len(tally.lost)} lost")
    assert tally.lost


def test_sigterm_lets_running_tasks_finish(tmp_path: Path, smtp_server: SmtpServer) -> None:
    """A stop within the grace ends with exit code 0, and with the mail sent once."""
    smtp_server.delay["dot"] = 1.0
    with Service(tmp_path, catcher=False, smtp_port=smtp_server.port) as service:
        task = service.post("/send-notification/ada@example.com").json()
        service.wait_for(task["id"], "running")

        assert service.stop() == 0
        assert len(smtp_server.received) == 1
        service.start()
        assert service.wait_for(task["id"], "succeeded")["attempts"] == 1
    assert len(smtp_server.received) == 1


def test_sigterm_gives_back_what_takes_longer_than_the_grace(
    tmp_path: Path, smtp_server: SmtpServer
) -> None:
    """It does not wait for the rest, which is done after the next start, and not counted."""
    smtp_server.always["dot"] = "hang"
    with Service(
        tmp_path, catcher=False, smtp_port=smtp_server.port, shutdown_grace_seconds=1
    ) as service:
        task = service.post("/send-notification/ada@example.com").json()
        service.wait_for(task["id"], "running")

        began = time.monotonic()
        assert service.stop() == 0
        assert time.monotonic() - began < 2.0  # the grace, and a second

        smtp_server.always.clear()
        service.start()
        assert service.wait_for(task["id"], "succeeded")["attempts"] == 1
