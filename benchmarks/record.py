"""A record of finished tasks, as a service keeps it for a week, in an empty database.

Of 100 tasks, 90 are mails, 6 make thumbnails, and 4 save uploads. 97 have succeeded, 2 have failed,
and one was cancelled. The kind `remove_upload` is rare: one task in 10,000. Every third mail is of
a batch of 900, and each recipient has about ten mails. Every tenth task belongs to a client with an
API key, and the others to no client.
"""

import asyncio
import random
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import asyncpg

from afterward.engines import open_engine
from afterward.history import error_group
from afterward.task import new_id, to_json

DAYS = 6  # retention removes finished tasks after 7
KEEPER = "9f86d081884c7d65"  # a client with an API key
RECIPIENTS = 100_000
COLUMNS = (
    *("id", "kind", "arguments", "request_id", "about", "client", "batch_id", "status"),
    *("attempts", "max_attempts", "claims", "owner", "created_at", "updated_at", "due_at"),
    *("started_at", "finished_at", "result", "error", "history", "error_group"),
)
_ROWS_AT_ONCE = 10_000

Row = tuple[Any, ...]


def fill(url: str, tasks: int) -> None:
    """Fill an empty database with finished tasks. On PostgreSQL, it has the tables already."""
    if url.startswith("postgresql:"):
        asyncio.run(_fill_postgres(url, tasks))
    else:
        asyncio.run(_make_tables(url))
        _fill_sqlite(Path(url.removeprefix("sqlite:///")), tasks)


async def _make_tables(url: str) -> None:
    engine = open_engine(url)
    await engine.start()
    await engine.stop()


def _fill_sqlite(path: Path, tasks: int) -> None:
    insert = f"""
        INSERT INTO tasks ({", ".join(COLUMNS)}) VALUES ({", ".join("?" * len(COLUMNS))})
    """
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA synchronous = OFF")
        rows = _rows(tasks)
        while some := list(islice(rows, _ROWS_AT_ONCE)):
            with connection:
                connection.executemany(insert, some)


async def _fill_postgres(url: str, tasks: int) -> None:
    connection = await asyncpg.connect(url)
    try:
        rows = _rows(tasks)
        while some := list(islice(rows, _ROWS_AT_ONCE)):
            await connection.copy_records_to_table(
                "tasks", schema_name="afterward", columns=COLUMNS, records=some
            )
        await connection.execute("VACUUM ANALYZE")  # as autovacuum does within minutes
    finally:
        await connection.close()


def _rows(tasks: int) -> Iterator[Row]:
    """Return the rows of the tasks, the oldest first. They are the same for both databases."""
    chance = random.Random(16)
    step = DAYS * 24 * 3600.0 / tasks
    first = time.time() - DAYS * 24 * 3600.0
    batch_id = new_id(first)
    for number in range(tasks):
        at = first + number * step
        if number % 3000 == 0:
            batch_id = new_id(at)
        yield _row(chance, number, at, batch_id)


def _row(chance: random.Random, number: int, at: float, batch_id: str) -> Row:
    kind = _kind(number)
    is_mail = kind == "send_email"
    recipient = f"user{chance.randrange(RECIPIENTS)}@example.com"
    status = "failed" if number % 50 == 7 else "cancelled" if number % 100 == 8 else "succeeded"
    error = _error(chance) if status == "failed" else None
    task_id = new_id(at)
    arguments = {"recipient": recipient, "subject": "Hello", "message": "It is done."}
    failure = {"attempt": 1, "started_at": at, "seconds": 0.2, "worker": "mail-1:4711:5f2a"}
    return (
        task_id,
        kind,
        to_json({"args": [], "kwargs": arguments}),
        new_id(at),
        recipient if is_mail else task_id,
        KEEPER if number % 10 == 3 else "",
        batch_id if is_mail and number % 3 == 0 else None,
        status,
        *(1, 8, 1, "mail-1:4711:5f2a", at, at + 0.2, at, at, at + 0.2),
        to_json({"message_id": f"<{task_id}@example.com>"}) if status == "succeeded" else None,
        error,
        None if error is None else to_json([failure]),
        error_group(error),
    )


def _kind(number: int) -> str:
    if number % 10_000 == 17:
        return "remove_upload"
    part = number % 100
    return "send_email" if part < 90 else "make_thumbnail" if part < 96 else "save_upload"


def _error(chance: random.Random) -> str:
    code = chance.choice((550, 551, 552, 553, 554))
    detail = f"{code} 5.1.1 The mailbox does not exist, or is full, or refuses this mail."
    return to_json({"type": "PermanentError", "detail": detail, "smtp_code": code})
