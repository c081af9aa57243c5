"""Fourth stop: the process is killed. No task that was answered 202 is lost.

Here the process is killed once. tests/faults/test_killed_under_load.py kills it many times, and
counts the mails that plain BackgroundTasks lose.
"""

from pathlib import Path

from tests.support.service import Service
from tests.support.smtp_server import SmtpServer

SEND = "/send-notification/ada@example.com"


def test_after_kill_9_and_a_restart_every_mail_arrives(
    tmp_path: Path, smtp_server: SmtpServer
) -> None:
    """A killed process cannot write anything more, but its promises are on disk already."""
    smtp_server.delay["dot"] = 0.2
    with Service(
        tmp_path, catcher=False, smtp_port=smtp_server.port, worker_concurrency=2
    ) as service:
        promised = [service.post(SEND).json()["id"] for _ in range(10)]
        service.wait_for(promised[0])

        service.kill()
        assert len(smtp_server.received) < len(promised)

        service.start()
        for task_id in promised:
            service.wait_for(task_id)
    # At least once: the two mails that were being sent at the kill may arrive twice.
    assert len(promised) <= len(smtp_server.received) <= len(promised) + 2


def test_sigterm_lets_running_tasks_finish(tmp_path: Path, smtp_server: SmtpServer) -> None:
    """The task ends within the grace period, so the exit code is 0, and the mail is sent once."""
    smtp_server.delay["dot"] = 1.0
    with Service(tmp_path, catcher=False, smtp_port=smtp_server.port) as service:
        task = service.post(SEND).json()
        service.wait_for(task["id"], "running")

        assert service.stop() == 0
        assert len(smtp_server.received) == 1
        service.start()
        assert service.wait_for(task["id"])["attempts"] == 1
    assert len(smtp_server.received) == 1
