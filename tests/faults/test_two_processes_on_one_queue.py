"""Several processes work on the same queue.

On a SQLite file, the second process refuses to start. On PostgreSQL, the processes share the work.
In both cases no task is claimed twice. The tests count outside the queue, by the mails or marks
that tasks leave.
"""

import os
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from afterward.engines.sqlite import engine as sqlite_module
from afterward.engines.sqlite.engine import SQLite
from tests.library.support import NOW, a_task, claim_all, recover
from tests.library.support import put as put_tasks
from tests.support.marks import leave_a_mark
from tests.support.postgres import Sql
from tests.support.service import COMMAND, Process, Service, free_port, until
from tests.support.smtp_server import SmtpServer
from tests.support.torture import Tried, form
from tests.support.workers import UNFINISHED, WORKER, processes, put, runs, workers

SEND = "/send-notification/ada@example.com"
WORKERS = 4
TASKS = form(2_000, 100_000)


def test_a_second_process_on_a_sqlite_file_refuses_to_start(
    tmp_path: Path, smtp_server: SmtpServer, tried: Tried
) -> None:
    """This holds for a server, a worker, and a link to the file. The first process continues."""
    smtp_server.delay["dot"] = 0.2
    (tmp_path / "link.db").symlink_to("queue.db")
    ids = []
    with (
        Service(tmp_path, catcher=False, smtp_port=smtp_server.port) as first,
        second_on(tmp_path / "queue.db", COMMAND) as server,
        second_on(tmp_path / "queue.db", WORKER) as worker,
        second_on(tmp_path / "link.db", COMMAND) as linked,
    ):
        seconds = [server, worker, linked]
        while not all(process.ended or "task succeeded" in process.log for process in seconds):
            ids.append(first.post(SEND).json()["id"])
            time.sleep(0.05)
        attempts = [first.wait_for(task_id)["attempts"] for task_id in ids]
        refused = [process for process in seconds if process.ended and process.wait() != 0]

    tried(
        f"SQLite: {len(seconds)} more processes while {len(ids)} tasks come in",
        f"{len(refused)} refused, {len(smtp_server.received) - len(ids)} mails sent twice",
    )
    assert refused == seconds
    for process in seconds:
        assert "SQLite serves one process; several need a postgresql:// URL" in process.log
        assert "Traceback" not in process.log
    assert attempts == [1] * len(ids)
    assert len(smtp_server.received) == len(ids)


def second_on(database: Path, command: Sequence[str]) -> Process:
    """Return a process that uses the same file."""
    return Process(
        database.parent / f"{command[-1]}-{database.stem}",
        command=command,
        queue_url=f"sqlite:///{database}",
        port=free_port(),
        catcher=False,
    )


@pytest.mark.anyio
async def test_control_without_the_lock_tasks_of_a_sqlite_file_are_claimed_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tried: Tried
) -> None:
    """A process that starts re-queues the running tasks, because it expects no other process."""
    monkeypatch.setattr(sqlite_module, "lock", lambda _: os.open(os.devnull, os.O_RDONLY))
    first, second = (SQLite(tmp_path / "queue.db") for _ in range(2))
    await first.start()
    await put_tasks(first, *(a_task() for _ in range(10)))
    running = {task.id for task in await claim_all(first, "first")}
    await second.start()
    await recover(second, "second", now=NOW)  # re-queues the tasks of the first process
    twice = running & {task.id for task in await claim_all(second, "second")}
    await second.stop()
    await first.stop()

    tried("SQLite without its lock: 10 tasks, 2 processes", f"{len(twice)} claimed twice")
    assert twice


def test_four_workers_run_each_task_exactly_once(
    tmp_path: Path, database_url: str, sql: Sql, tried: Tried
) -> None:
    ids = put(database_url, leave_a_mark, TASKS)
    began = time.monotonic()
    with workers(tmp_path, WORKERS, queue_url=database_url, quiet=True) as at_work:
        until(lambda: sql(UNFINISHED) == "0", within=60 + TASKS / 50)
        seconds = time.monotonic() - began
        assert [worker.stop() for worker in at_work] == [0] * WORKERS

    done = runs(tmp_path)
    twice = done.total() - len(done)
    tried(
        f"PostgreSQL: {TASKS:,} tasks, {WORKERS} workers, {TASKS / seconds:,.0f} tasks/s",
        f"{twice} run twice, {len(ids - set(done))} lost",
    )
    assert set(done) == ids
    assert twice == 0
    assert sql("SELECT count(*) FROM afterward.tasks WHERE claims <> 1") == "0"
    assert processes(tmp_path) == WORKERS


def test_control_workers_without_claims_run_tasks_twice(
    tmp_path: Path, database_url: str, tried: Tried
) -> None:
    """A simple worker lists the waiting tasks, runs them, and removes them afterwards."""
    ids = put(database_url, leave_a_mark, 200)
    with workers(
        tmp_path, WORKERS, queue_url=database_url, without="claims", together=WORKERS
    ) as at_work:
        assert [worker.wait(60) for worker in at_work] == [0] * WORKERS

    done = runs(tmp_path)
    twice = sum(times > 1 for times in done.values())
    tried(f"without claims: {len(ids)} tasks, {WORKERS} workers", f"{twice} run twice or more")
    assert set(done) == ids
    assert twice
