"""The API and the workers in separate processes, which share only a PostgreSQL database."""

import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import datetime
from itertools import takewhile
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.support.postgres import Sql
from tests.support.service import (
    PATIENCE,
    Json,
    Process,
    Service,
    environment,
    free_port,
    until,
)
from tests.support.smtp_server import SmtpServer
from tests.support.workers import WORKER

UVICORN = (sys.executable, "-m", "uvicorn", "app.main:app", "--port={port}", "--workers=4")
SEND = "/send-notification/ada@example.com"
CUT_CONNECTIONS = (
    "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity "
    "WHERE application_name = 'afterward' AND datname = current_database()"
)


@pytest.fixture
def api(tmp_path: Path, database_url: str) -> Iterator[Service]:
    """An API without a worker inside."""
    with api_in(tmp_path / "api", database_url) as api:
        yield api


@pytest.fixture
def worker(tmp_path: Path, database_url: str, smtp_server: SmtpServer) -> Process:
    """A worker process without an API, not yet started."""
    return Process(
        tmp_path / "worker",
        command=WORKER,
        queue_url=database_url,
        smtp_port=smtp_server.port,
        shutdown_grace_seconds=1,
    )


@pytest.mark.thorough
def test_a_worker_runs_the_tasks_of_the_api_and_the_api_shows_their_progress(
    api: Service, worker: Process, smtp_server: SmtpServer
) -> None:
    """The API shows it in its event streams and metrics; the worker writes the log lines."""
    task = api.post(SEND).json()
    with following(api, "/events") as of_all, following(api, f"/tasks/{task['id']}/events") as own:
        assert next(own)["status"] == "queued"
        with worker:
            assert [change["status"] for change in own] == ["running", "succeeded"]
            # An API that has just started tells once more what is waiting, in case it missed it.
            statuses = (change["status"] for change in of_all)
            told = takewhile(lambda status: status != "succeeded", statuses)
            assert [status for status in told if status != "queued"] == ["running"]
            assert api.wait_for(task["id"])["attempts"] == 1
    assert len(smtp_server.received) == 1

    metrics = api.get("/metrics").text
    for line in (
        'afterward_tasks_total{kind="send_email",outcome="queued"} 1.0',
        'afterward_tasks_total{kind="send_email",outcome="started"} 1.0',
        'afterward_tasks_total{kind="send_email",outcome="succeeded"} 1.0',
        'afterward_task_duration_seconds_count{kind="send_email",outcome="succeeded"} 1.0',
    ):
        assert line in metrics

    for line in ("mail handed over", "task succeeded"):
        assert worker.log.count(line) == 1
        assert line not in api.log


@pytest.mark.thorough
def test_a_notification_wakes_a_worker_long_before_its_next_poll(
    api: Service, worker: Process, sql: Sql
) -> None:
    """In the negative control, a task without a notification waits for the worker's next poll."""
    with worker:
        wait_for_a_task(api)  # the worker has started
        woken = statistics.median(wait_for_a_task(api) for _ in range(5))
        found = statistics.median(wait_without_notification(api, sql) for _ in range(5))
    print(f"woken after {woken:.3f} s, else {found:.3f} s")
    assert woken < found / 2


@pytest.mark.thorough
def test_idle_connections_that_are_cut_are_replaced(
    api: Service, worker: Process, sql: Sql
) -> None:
    """This includes those that listen: new tasks wake the worker, and events reach the API."""
    with worker:
        wait_for_a_task(api)
        until(lambda: counted_successes(api) == 1, within=PATIENCE)
        assert int(sql(CUT_CONNECTIONS)) >= 4  # each process has one for work and one to listen
        time.sleep(0.3)  # a request at this very moment may be refused with a 503

        def tells_again() -> bool:
            assert wait_for_a_task(api) < PATIENCE / 2
            return counted_successes(api) > 1

        took = until(tells_again, within=2 * PATIENCE)
    print(f"told of again after {took:.1f} s")


@pytest.mark.thorough
def test_two_apis_make_one_task_of_the_same_idempotency_key(
    tmp_path: Path, database_url: str, api: Service, sql: Sql
) -> None:
    """Both get the request at the same time, and both give the same response."""
    keys = [f"key-{number}" for number in range(40)]
    with api_in(tmp_path / "other", database_url) as other, ThreadPoolExecutor(4) as clients:

        def ask(service: Service, key: str) -> httpx2.Response:
            return service.post(SEND, headers={"Idempotency-Key": key})

        pairs = [[clients.submit(ask, service, key) for service in (api, other)] for key in keys]
        answers = [[answer.result() for answer in pair] for pair in pairs]

    assert {answer.status_code for pair in answers for answer in pair} == {202}
    assert all(first.json() == second.json() for first, second in answers)
    assert sql("SELECT count(*) FROM afterward.tasks") == str(len(keys))


@pytest.mark.thorough
def test_uvicorn_runs_several_processes_on_postgresql(
    tmp_path: Path, database_url: str, smtp_server: SmtpServer
) -> None:
    """Each of its processes is an API with a worker inside."""
    service = Service(
        tmp_path,
        command=UVICORN,
        queue_url=database_url,
        catcher=False,
        smtp_port=smtp_server.port,
        pythonwarnings="default",  # uvicorn leaves sockets to the garbage collector
    )
    with service:
        try:
            ids = [service.post(SEND).json()["id"] for _ in range(40)]
            for task_id in ids:
                service.wait_for(task_id)
        finally:
            code = service.stop()
    assert code == 0
    assert len(smtp_server.received) == len(ids)
    assert service.log.count("Application startup complete") == 4


@pytest.mark.thorough
def test_uvicorn_does_not_run_several_processes_on_sqlite(tmp_path: Path) -> None:
    """Its processes end with a line that says what to do."""
    port = free_port()
    command = [part.format(port=port) for part in UVICORN]
    with Process(tmp_path, command=command, catcher=False, pythonwarnings="default") as process:
        process.wait(3 * PATIENCE)
    assert "SQLite serves one process; several need a postgresql:// URL" in process.log
    with pytest.raises(httpx2.ConnectError):
        httpx2.get(f"http://127.0.0.1:{port}/livez")


@pytest.mark.thorough
def test_a_separate_worker_with_a_concurrency_of_zero_is_refused(tmp_path: Path) -> None:
    ended = subprocess.run(
        WORKER,
        cwd=tmp_path,
        env=environment(worker_concurrency=0),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert ended.returncode == 2
    (line,) = (ended.stdout + ended.stderr).splitlines()
    assert line.startswith("bad settings: WORKER_CONCURRENCY: ")


def api_in(directory: Path, url: str) -> Service:
    """Make an API without a worker inside."""
    return Service(directory, queue_url=url, catcher=False, worker_concurrency=0)


def wait_for_a_task(api: Service) -> float:
    """Queue a task, and return the seconds until it started."""
    return waited(api.wait_for(api.post(SEND).json()["id"]))


def waited(task: dict[str, Any]) -> float:
    """Return the seconds between a task's acceptance and its start."""
    created, started = (
        datetime.fromisoformat(task[f"{what}_at"]) for what in ("created", "started")
    )
    return (started - created).total_seconds()


def wait_without_notification(api: Service, sql: Sql) -> float:
    """Copy an earlier task without a notification, and return the seconds until it started."""
    task_id = sql(
        """
        INSERT INTO afterward.tasks
            (id, kind, arguments, status, max_attempts, created_at, updated_at, due_at)
        SELECT gen_random_uuid()::text, kind, arguments, 'queued', max_attempts, now, now, now
        FROM afterward.tasks, extract(epoch FROM clock_timestamp()) AS now
        ORDER BY seq LIMIT 1 RETURNING id
        """
    )
    return waited(api.wait_for(task_id))


def counted_successes(api: Service) -> int:
    """Return the number of successes in the API's metrics."""
    counted = re.search(
        r'^afterward_tasks_total{kind="send_email",outcome="succeeded"} (\d+)',
        api.get("/metrics").text,
        re.MULTILINE,
    )
    return int(counted[1]) if counted else 0


@contextmanager
def following(api: Service, path: str) -> Iterator[Iterator[Json]]:
    """Follow a stream, which has begun when the block begins; yield the tasks in its events."""
    with httpx2.stream("GET", api.url + path, timeout=PATIENCE) as stream:
        lines = (line.partition("data: ") for line in stream.iter_lines())
        yield (json.loads(data) for _, found, data in lines if found)
