"""P12: the duration of a start until the first claim, with 100,000 unfinished tasks.

50,000 tasks are queued, 49,000 wait for a retry, and 1,000, the most that a process can run, were
running when their process died. The database file is not in the page cache, as after a restart of
the machine.
"""

import json
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from datetime import datetime
from functools import partial
from pathlib import Path

from benchmarks.harness import Failed, Result, Spread, Target, in_turn
from benchmarks.load import server
from benchmarks.p8_backlog import database_with_backlog
from benchmarks.p18_record import drop_from_page_cache
from benchmarks.sinks import Sink, sink

UNFINISHED = 100_000
RETRYING = 49_000
RUNNING = 1_000
LONGEST_SECONDS = 20.0


def measure(quick: bool) -> Iterator[Result]:
    """Start on a copy of the same tasks several times. There is no other contestant."""
    with tempfile.TemporaryDirectory() as name, sink() as receiver:
        first_claim = partial(_first_claim, _unfinished(Path(name)), receiver)
        first_claim()  # to warm up
        seconds = in_turn(5 if quick else 15, {"ours": first_claim})["ours"]
    yield Result(
        "P12",
        f"from the start of the process to the first claim, {UNFINISHED:,} tasks unfinished",
        Spread.of(seconds),
        unit="s",
        target=Target("≤", 1),
    )


def _unfinished(directory: Path) -> Path:
    path = database_with_backlog(directory, UNFINISHED)
    now = time.time()
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(
            """
            UPDATE tasks SET status = 'retrying', attempts = 1, claims = 1, started_at = :now,
                due_at = :now + seq % 60, error = '{"type":"MailDeferred","detail":"later"}'
            WHERE seq <= :retrying
            """,
            {"now": now, "retrying": RETRYING},
        )
        connection.execute(
            """
            UPDATE tasks SET status = 'running', attempts = 1, claims = 1, started_at = :now,
                owner = 'a worker that died', lease_expires_at = :now + 30
            WHERE seq > :queued
            """,
            {"now": now, "queued": UNFINISHED - RUNNING},
        )
    return path


def _first_claim(tasks: Path, receiver: Sink) -> float:
    """Start the service on a copy; return the seconds until it logs the first claimed task."""
    path = tasks.with_name("copy.db")
    shutil.copy(tasks, path)
    drop_from_page_cache(path)
    settings = {
        "QUEUE_URL": f"sqlite:///{path}",
        "SMTP_PORT": str(receiver.port),
        "LOG_LEVEL": "DEBUG",
    }
    began = time.time()
    with server(tasks.parent, "-m", "app", **settings) as running:
        claimed_at = _claimed_at(running.log)
        running.process.kill()
    for file in tasks.parent.glob(f"{path.name}*"):
        file.unlink()
    return claimed_at - began


def _claimed_at(log: Path) -> float:
    """Return the time of the first claim, from the timestamps of the log.

    The claim also re-queues the tasks of the process that died, and the log names these first.
    """
    deadline = time.monotonic() + LONGEST_SECONDS
    while time.monotonic() < deadline:
        for line in log.read_text().splitlines():
            if '"task recovered"' in line or '"task started"' in line:
                return datetime.fromisoformat(json.loads(line)["timestamp"]).timestamp()
        time.sleep(0.01)
    raise Failed(f"no task was claimed:\n{log.read_text()[-2000:]}")
