"""P18: the duration of a start until the first 202, with 1,000,000 finished tasks in the database.

Retention keeps finished tasks for a week, so they are most of the file: 460 MB here. The file is
not in the page cache, as after a restart of the machine. A database with 100,000 finished tasks is
measured in turn, to show whether the start takes longer with each finished task.
"""

import os
import sqlite3
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path

from benchmarks.harness import Result, Spread, Target, compared, in_turn
from benchmarks.p8_backlog import database_with_backlog
from benchmarks.p11_start import first_202

FEW, MANY = 100_000, 1_000_000
DAYS = 6  # of finished tasks; retention removes them after 7


def measure(quick: bool) -> Iterator[Result]:
    """Start on each database several times, in turn."""
    with tempfile.TemporaryDirectory() as name:
        contestants = {
            f"{tasks:,}": partial(_start, _database_with_record(Path(name), tasks), tasks)
            for tasks in (FEW, MANY)
        }
        in_turn(1, contestants)  # to warm up
        seconds = in_turn(5 if quick else 15, contestants)
    few, many = seconds.values()
    yield Result(
        "P18",
        f"from the start of the process to the first 202, {MANY:,} tasks finished",
        Spread.of(many),
        unit="s",
        target=Target("≤", 1.5),
    )
    yield compared(
        "P18",
        f"the same, against {FEW:,} tasks finished",
        many,
        few,
        target=Target("≤", 1.1),
        unit="s",
    )


def _database_with_record(directory: Path, tasks: int) -> Path:
    path = database_with_backlog(directory, tasks)
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("PRAGMA synchronous = OFF")
        connection.execute(
            """
            UPDATE tasks SET status = 'succeeded', attempts = 1, claims = 1,
                finished_at = :now - :seconds * seq / :tasks,
                result = '{"message_id": "<0197a2b3-4f2c-7000-8000-0123456789ab@example.com>"}'
            """,
            {"now": time.time(), "seconds": DAYS * 24 * 3600.0, "tasks": tasks},
        )
    return path


def _start(path: Path, tasks: int) -> float:
    """Start on the database; return the seconds to the first 202. Then restore the database."""
    drop_from_page_cache(path)
    seconds = first_202(QUEUE_URL=f"sqlite:///{path}")
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("DELETE FROM tasks WHERE seq > ?", (tasks,))
    return seconds


def drop_from_page_cache(path: Path) -> None:
    """Drop a file from the page cache, so that it is read from the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())  # because only written pages can be dropped
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
