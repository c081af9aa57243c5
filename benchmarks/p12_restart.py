"""P12: how long a start takes until the first claim, when 100,000 tasks are unfinished.

Half of them are queued; of the others most wait for another attempt, and a thousand, the most that
one process runs at once, were running when their process died. The file is on the disk and nowhere
else, as after a restart of the machine.
"""

import json
import os
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
from benchmarks.p8_backlog import filled
from benchmarks.sinks import Sink, sink

UNFINISHED = 100_000
RETRYING = 49_000
RUNNING = 1_000
LONGEST_SECONDS = 20.0


def measure(quick: bool) -> Iterator[Result]:
    """Start on the same tasks over and over; there is nobody to take turns with."""
    with tempfile.TemporaryDirectory() as name, sink() as taker:
        first_claim = partial(_first_claim, _unfinished(Path(name)), taker)
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
    path = filled(directory, UNFINISHED)
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


def _first_claim(tasks: Path, taker: Sink) -> float:
    """Start the service on a copy; seconds until the log tells of what was claimed."""
    path = tasks.with_name("copy.db")
    shutil.copy(tasks, path)
    with path.open("rb") as copy:
        os.fsync(copy.fileno())  # what is on the disk, a start takes out of the cache
    settings = {
        "QUEUE_URL": f"sqlite:///{path}",
        "SMTP_PORT": str(taker.port),
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
    """When the first claim had come, by `time.time()`; each line of the log tells its time.

    First it tells of the tasks that were taken back from the process that died.
    """
    deadline = time.monotonic() + LONGEST_SECONDS
    while time.monotonic() < deadline:
        for line in log.read_text().splitlines():
            if '"task recovered"' in line or '"task started"' in line:
                return datetime.fromisoformat(json.loads(line)["timestamp"]).timestamp()
        time.sleep(0.01)
    raise Failed(f"no task was claimed:\n{log.read_text()[-2000:]}")
