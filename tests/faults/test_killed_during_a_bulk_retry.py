"""The service is killed with SIGKILL, again and again, while it retries many failed mails at once.

Each mail is retried once, and the result of the action counts each once: a kill neither repeats a
slice nor loses its count, because a slice and its record are one transaction. The SMTP server
refuses each retried mail, so the history of a mail tells how often it was retried.
"""

import asyncio
import json
import random
import sys
import time
from collections import Counter
from pathlib import Path

from afterward.engine import Engine
from afterward.engines import open_engine
from afterward.task import Outcome, Status, Task, Writes, new_id, to_json
from tests.support.service import Json, Service, until
from tests.support.smtp_server import SmtpServer
from tests.support.torture import Tried, form

MAILS = form(600, 10_000)
KILLS = form(2, 10)
SLICE = form(25, 100)
PATIENCE = 60.0 + MAILS / 50  # seconds: for the leases of crashed tasks, and for the mails
SERVICE = (sys.executable, "-m", "tests.support.bulk_slices")
REFUSED = to_json({"type": "PermanentError", "detail": "refused", "smtp_code": 550})


def test_each_mail_is_retried_once(
    tmp_path: Path, queue_url: str, smtp_server: SmtpServer, tried: Tried
) -> None:
    mails = asyncio.run(failed_mails(queue_url, MAILS))
    action = retry_with_kills(tmp_path, queue_url, smtp_server, kills=KILLS)
    retries = asyncio.run(count_retries(queue_url, mails))

    engine = queue_url.partition(":")[0]
    tried(
        f"{engine}: {MAILS:,} failed mails, {KILLS} kills, {action['attempts']} attempts",
        f"{action['result']['done']:,} counted; retried {dict(retries)}",
    )
    assert action["result"] == {"matched": MAILS, "done": MAILS, "skipped": 0}
    assert action["attempts"] > 1
    assert retries == {1: MAILS}


def test_control_with_two_transactions_the_count_is_wrong(
    tmp_path: Path, smtp_server: SmtpServer, tried: Tried
) -> None:
    """By chance, all kills may miss the moments between two transactions. So try several times."""
    for trial in range(1, 6):
        directory = tmp_path / str(trial)
        directory.mkdir()
        queue_url = f"sqlite:///{directory}/queue.db"
        mails = asyncio.run(failed_mails(queue_url, 500))
        action = retry_with_kills(
            directory, queue_url, smtp_server, kills=form(3, 5), without="transaction"
        )
        skipped = action["result"]["skipped"]
        tried(f"two transactions for each slice, run {trial}", f"{skipped} of 500 not counted")
        assert asyncio.run(count_retries(queue_url, mails)) == {1: 500}
        if action["result"]["done"] < 500:
            break
    assert action["result"]["done"] < 500


async def failed_mails(queue_url: str, number: int) -> list[Task]:
    """Put mails that have failed into the database, and return their tasks."""
    engine = open_engine(queue_url)
    await engine.start()
    now = time.time()
    tasks = [_mail(n, now) for n in range(number)]
    for first in range(0, number, 1_000):
        await engine.put(Writes(tuple(tasks[first : first + 1_000])))
    while claimed := await _claim(engine, now):
        failed = Outcome(Status.FAILED, error=REFUSED)
        await asyncio.gather(*(engine.settle(task, failed, now) for task in claimed))
    await engine.stop()
    return tasks


def _mail(number: int, now: float) -> Task:
    mail = {"recipient": f"user{number}@example.com", "subject": "Hello", "message": "Hello"}
    return Task(
        id=new_id(now),
        kind="send_email",
        arguments=to_json({"args": [], "kwargs": mail}),
        created_at=now,
        updated_at=now,
        due_at=now,
    )


async def _claim(engine: Engine, now: float) -> tuple[Task, ...]:
    claim = await engine.claim("before", kinds=["send_email"], limit=500, now=now, lease=600)
    return claim.running


def retry_with_kills(
    directory: Path, queue_url: str, smtp_server: SmtpServer, *, kills: int, without: str = ""
) -> Json:
    """Retry all mails, kill the service meanwhile, and return the task of the action at the end."""
    smtp_server.always["rcpt"] = "550 5.1.1 Nobody of this name"
    with Service(
        directory,
        command=SERVICE,
        queue_url=queue_url,
        catcher=False,
        smtp_port=smtp_server.port,
        lease_seconds=1,  # crashed tasks wait for its end
        slice=SLICE,
        without=without,
    ) as service:
        wanted = {"filter": {"kind": "send_email", "status": "failed"}}
        action = service.post("/tasks/retry", json=wanted).raise_for_status().json()
        for kill in range(kills):
            # The last kill comes before the last quarter, so that it hits the action too.
            _wait_for_progress(service, action, random.uniform(kill, kill + 1) / kills * 0.75)
            service.kill()
            service.start()
        ended = service.wait_for(action["id"], at_most=PATIENCE)
        until(lambda: not _unfinished(service), within=PATIENCE)
        service.stop()
    return ended


def _wait_for_progress(service: Service, action: Json, progress: float) -> None:
    def is_reached() -> bool:
        task = service.get(f"/tasks/{action['id']}").raise_for_status().json()
        return bool((task["progress"] or 0.0) >= progress)

    until(is_reached, within=PATIENCE)


def _unfinished(service: Service) -> list[Json]:
    page = service.get("/tasks?status=queued,running,retrying&limit=1").raise_for_status().json()
    tasks: list[Json] = page["data"]
    return tasks


async def count_retries(queue_url: str, mails: list[Task]) -> Counter[int]:
    """Return how many mails were retried how often.

    Each retry counts the attempts from 1 again. The history has the first attempt of each round,
    because it was refused, or a kill crashed it.
    """
    engine = open_engine(queue_url)
    await engine.start()
    retries = Counter[int]()
    for mail in mails:
        history = json.loads((await engine.get(mail.id)).history or "[]")
        retries[sum(attempt["attempt"] == 1 for attempt in history) - 1] += 1
    await engine.stop()
    return retries
