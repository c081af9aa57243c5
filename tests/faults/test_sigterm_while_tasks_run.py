"""SIGTERM arrives while tasks run that take longer than the grace period.

The worker gives them back without counting an attempt. The process ends within the grace period
plus a second, with exit code 0. After the next start every task is done. Only a task with a single
attempt fails, because its work may be done.
"""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from afterward.engine import Engine
from afterward.events import EventType
from afterward.task import Status
from afterward.worker import Worker
from tests.library.support import Clock, EventRecorder, claim_one, promise, queue_of, wait_forever
from tests.support.service import PATIENCE, Process, Service, until
from tests.support.smtp_server import HANG, SmtpServer
from tests.support.torture import Tried, form
from tests.support.workers import WORKER

SEND = "/send-notification/ada@example.com"
AT_ONCE = 10  # tasks that run at the same time
TASKS = form(15, 200)
GRACE = 1  # seconds
IN_TIME = GRACE + form(10.0, 1.0)

UVICORN = (sys.executable, "-m", "uvicorn", "tests.support.tutorial:app", "--port={port}")
WAITS = "uvicorn"
GIVES_UP = "uvicorn with --timeout-graceful-shutdown"
PLAIN = {WAITS: UVICORN, GIVES_UP: (*UVICORN, f"--timeout-graceful-shutdown={GRACE}")}


@pytest.mark.anyio
async def test_a_stopping_worker_gives_unfinished_tasks_back(engine: Engine, clock: Clock) -> None:
    """The attempt is not counted, and the task is due at once."""
    queue = queue_of(engine, wait_forever, now=clock)
    recorder = EventRecorder(queue)
    task = await promise(queue, wait_forever)
    worker = Worker(queue, None)
    await worker.start()
    await recorder.until(EventType.STARTED)
    await worker.stop(grace=0.1)
    given_back = await engine.get(task.id)
    assert (given_back.status, given_back.attempts) == (Status.QUEUED, 0)
    assert recorder.event_types == ["queued", "started", "given_back"]
    assert (await claim_one(engine)).id == task.id


def test_the_service_ends_in_time_and_loses_no_task(
    tmp_path: Path, smtp_server: SmtpServer, tried: Tried
) -> None:
    """The running and the waiting tasks are done after the next start."""
    smtp_server.always["dot"] = HANG
    with Service(
        tmp_path, catcher=False, smtp_port=smtp_server.port, shutdown_grace_seconds=GRACE
    ) as service:
        ids = [service.post(SEND).json()["id"] for _ in range(TASKS)]
        until(lambda: len(smtp_server.received) == AT_ONCE, within=PATIENCE)
        code, seconds = stop(service)

        smtp_server.always.clear()
        service.start()
        attempts = [service.wait_for(task_id)["attempts"] for task_id in ids]

    tried(
        f"SQLite: SIGTERM with {AT_ONCE} of {TASKS} tasks running, {GRACE} s grace",
        f"exit code {code} after {seconds:.1f} s, {TASKS - len(attempts)} lost",
    )
    assert code == 0
    assert attempts == [1] * TASKS


def test_a_mail_with_one_attempt_is_not_sent_again_after_a_stop(
    tmp_path: Path, smtp_server: SmtpServer
) -> None:
    """The server has the mail, but has not replied to the final dot when the grace is over."""
    smtp_server.always["dot"] = HANG
    with Service(
        tmp_path,
        catcher=False,
        smtp_port=smtp_server.port,
        shutdown_grace_seconds=0,
        mail_retry_seconds=0,
    ) as service:
        task_id = service.post(SEND).json()["id"]
        until(lambda: len(smtp_server.received) == 1, within=PATIENCE)
        stop(service)

        smtp_server.always.clear()
        service.start()
        task = service.wait_for(task_id, status="failed")
    assert (task["attempts"], task["error"]["type"]) == (1, "WorkerStopped")
    assert len(smtp_server.received) == 1


def test_a_worker_process_gives_its_tasks_back_to_other_workers(
    tmp_path: Path, database_url: str, smtp_server: SmtpServer, tried: Tried
) -> None:
    """On PostgreSQL, the tasks are due at once, although the lease runs for ten more minutes."""
    smtp_server.always["dot"] = HANG
    api = Service(tmp_path / "api", queue_url=database_url, catcher=False, worker_concurrency=0)
    worker = Process(
        tmp_path / "worker",
        command=WORKER,
        queue_url=database_url,
        smtp_port=smtp_server.port,
        shutdown_grace_seconds=GRACE,
        lease_seconds=600,
    )
    with api:
        ids = [api.post(SEND).json()["id"] for _ in range(TASKS)]
        with worker:
            until(lambda: len(smtp_server.received) == AT_ONCE, within=PATIENCE)
            code, seconds = stop(worker)
        statuses = {api.get(f"/tasks/{task_id}").json()["status"] for task_id in ids}

        smtp_server.always.clear()
        with worker:
            attempts = [api.wait_for(task_id)["attempts"] for task_id in ids]

    tried(
        f"PostgreSQL: SIGTERM with {AT_ONCE} of {TASKS} tasks running, {GRACE} s grace",
        f"exit code {code} after {seconds:.1f} s, {TASKS - len(attempts)} lost",
    )
    assert code == 0
    assert worker.log.count("task given_back") == AT_ONCE
    assert statuses == {"queued"}
    assert attempts == [1] * TASKS


@pytest.mark.parametrize("server", PLAIN)
def test_control_plain_background_tasks_end_too_late_or_are_lost(
    tmp_path: Path, smtp_server: SmtpServer, tried: Tried, server: str
) -> None:
    """Uvicorn waits for them without a limit. With a limit it cancels them, so they are lost."""
    smtp_server.always["dot"] = HANG
    with Service(tmp_path, command=PLAIN[server], smtp_port=smtp_server.port) as service:
        for _ in range(10):
            service.post(SEND).raise_for_status()
        until(lambda: len(smtp_server.received) == 10, within=PATIENCE)
        code, seconds = stop(service)

        smtp_server.always.clear()
        smtp_server.received.clear()
        service.start()
        time.sleep(0.5)  # time for mail to arrive, if any were left
    lost = 10 - len(smtp_server.received)

    how = f"exit code {code}" if code is not None else "had to be killed"
    tried(f"{server}: SIGTERM with 10 running", f"{how} after {seconds:.1f} s, {lost} lost")
    assert (code is None) == (server == WAITS)
    assert lost == 10


def stop(process: Process) -> tuple[int | None, float]:
    """Send SIGTERM; return the exit code, or None if it does not end in time, and the seconds."""
    began = time.monotonic()
    code = None
    try:
        code = process.stop(within=IN_TIME)
    except subprocess.TimeoutExpired:
        process.kill()
    return code, time.monotonic() - began
