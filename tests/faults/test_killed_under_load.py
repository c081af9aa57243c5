"""The service is killed with SIGKILL at random instants while 16 clients send, and restarted.

Every mail that was answered 202 arrives, or its task is shown as failed. A kill can come after the
SMTP server's 250 and before the worker has committed the success. Then the mail is sent again, with
the same Message-ID.
"""

import sys
from pathlib import Path

from tests.support.kills import kill_under_load
from tests.support.service import Service
from tests.support.smtp_server import SmtpServer
from tests.support.torture import Tried, form

KILLS = form(2, 200)
ACCEPTED = form(160, 20_000)
AT_ONCE = form(4, 10)  # tasks that run at the same time
TUTORIAL = (sys.executable, "-m", "tests.support.tutorial")


def test_no_mail_that_was_answered_202_is_lost(
    tmp_path: Path, queue_url: str, smtp_server: SmtpServer, tried: Tried
) -> None:
    """Each kill causes at most one more copy for each running task."""
    with Service(
        tmp_path,
        queue_url=queue_url,
        catcher=False,
        smtp_port=smtp_server.port,
        worker_concurrency=AT_ONCE,
        lease_seconds=1,  # on PostgreSQL, crashed tasks wait for the end of their lease
    ) as service:
        tally = kill_under_load(service, smtp_server, kills=KILLS, accepted=ACCEPTED)
        attempts = {
            task_id: service.get(f"/tasks/{task_id}").json()["attempts"]
            for task_id, times in tally.delivered.items()
            if times > 1
        }

    engine = queue_url.partition(":")[0]
    tried(f"{engine}: {KILLS} kills, {len(tally.accepted):,} answered 202", str(tally))
    assert len(tally.accepted) >= ACCEPTED
    assert tally.lost == set()
    assert tally.renamed == 0
    assert tally.copies <= KILLS * AT_ONCE
    assert all(tally.delivered[task_id] <= made for task_id, made in attempts.items())


def test_control_plain_background_tasks_lose_mail(
    tmp_path: Path, smtp_server: SmtpServer, tried: Tried
) -> None:
    """The tutorial's service, under the same load and kills."""
    kills = form(2, 20)
    smtp_server.delay["dot"] = 0.2  # about as slow as a real server
    with Service(tmp_path, command=TUTORIAL, smtp_port=smtp_server.port) as service:
        tally = kill_under_load(service, smtp_server, kills=kills, accepted=80 * kills)

    tried(
        f"plain BackgroundTasks: {kills} kills, {len(tally.accepted):,} answered 202",
        f"{len(tally.lost):,} lost",
    )
    assert tally.lost
