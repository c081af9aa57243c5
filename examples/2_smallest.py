"""Durable background tasks in one file: a row before the 202, a worker, a retry, recovery.

    .venv/bin/uvicorn examples.2_smallest:app
    curl -X POST localhost:8000/send-notification/ada@example.com
    curl localhost:8000/tasks

A crash: ask for a mail, run `pkill -9 -f 'uvicorn examples.2'` within two seconds, and start the
server again. It prints "sent to ada@example.com", and the task has two attempts.
A failure: run `touch smtp-is-down`, and ask for a mail. The task has an error, and is 'queued' for
its next attempt (the library says 'retrying'). After `rm smtp-is-down` the mail is sent.
"""

import asyncio
import json
import random
import sqlite3
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from fastapi import FastAPI

MAX_ATTEMPTS = 8
database = sqlite3.connect("smallest.db", isolation_level=None)  # each statement is a transaction
database.row_factory = sqlite3.Row
database.executescript(f"""
    PRAGMA locking_mode = EXCLUSIVE;  -- a second process on this file refuses to start
    PRAGMA journal_mode = WAL;
    PRAGMA synchronous = FULL;  -- a commit returns when it is on disk (fsync)
    CREATE TABLE IF NOT EXISTS tasks (
        id INTEGER PRIMARY KEY, name TEXT, arguments TEXT, due_at REAL,
        status TEXT DEFAULT 'queued', attempts INTEGER DEFAULT 0, error TEXT
    );
    CREATE INDEX IF NOT EXISTS tasks_due ON tasks (due_at) WHERE status = 'queued';
    UPDATE tasks SET status = iif(attempts < {MAX_ATTEMPTS}, 'queued', 'failed'), error = 'crashed'
    WHERE status = 'running';  -- recovery: they were running when the last process ended
""")
CLAIM = """
    UPDATE tasks SET status = 'running', attempts = attempts + 1 WHERE id = (
        SELECT id FROM tasks WHERE status = 'queued' AND due_at <= ? ORDER BY due_at LIMIT 1
    ) RETURNING *
"""


async def send_email(recipient: str) -> None:
    """Stand in for SMTP. After a crash it runs again, even if the mail was sent just before."""
    if Path("smtp-is-down").exists():
        raise ConnectionError("the SMTP server does not answer")
    await asyncio.sleep(2)
    print(f"sent to {recipient}")


FUNCTIONS = {"send_email": send_email}


def add_task(name: str, **arguments: object) -> int | None:
    """Commit a task, and return its id. From now on it survives a crash of this process."""
    values = (name, json.dumps(arguments), time.time())
    insert = "INSERT INTO tasks (name, arguments, due_at) VALUES (?, ?, ?)"
    return database.execute(insert, values).lastrowid


async def work() -> None:
    """Claim one due task after another, and run it."""
    while True:
        # CLAIM is one statement, so no two workers get the same task. It counts the attempt before
        # the attempt runs, so a task that crashes the process each time fails at last.
        with suppress(sqlite3.OperationalError):  # for example, a full disk: claim again later
            while task := database.execute(CLAIM, (time.time(),)).fetchone():
                await run(task)
        await asyncio.sleep(0.1)  # then look again for new tasks, and for retries that are due


async def run(task: sqlite3.Row) -> None:
    """Run a task, and write its outcome. If the writing fails, the next start recovers the task."""
    status, due_at, message = "succeeded", time.time(), None
    try:
        await asyncio.wait_for(FUNCTIONS[task["name"]](**json.loads(task["arguments"])), timeout=60)
    except Exception as error:
        status, message = "failed", repr(error)
        if task["attempts"] < MAX_ATTEMPTS:  # back-off with full jitter: up to 1 s, 2 s, 4 s ...
            status, due_at = "queued", time.time() + random.uniform(0, 2 ** (task["attempts"] - 1))
    outcome = (status, due_at, message, task["id"])
    database.execute("UPDATE tasks SET status = ?, due_at = ?, error = ? WHERE id = ?", outcome)


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    """Run four workers beside the API, so that four tasks run at once."""
    workers = [asyncio.create_task(work()) for _ in range(4)]
    yield
    for worker in workers:
        worker.cancel()  # its task stays 'running' in the database, and the next start recovers it


app = FastAPI(lifespan=lifespan)


@app.post("/send-notification/{recipient}", status_code=202)
async def send_notification(recipient: str) -> dict[str, int | None]:
    """Promise a mail: its row is on disk before the 202."""
    return {"id": add_task("send_email", recipient=recipient)}


@app.get("/tasks")
async def list_tasks() -> list[dict[str, object]]:
    """Show how far the newest tasks are."""
    return [*map(dict, database.execute("SELECT * FROM tasks ORDER BY id DESC LIMIT 100"))]
