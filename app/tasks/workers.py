"""The record of each worker: its host, its tasks, and when it was seen last. Pages show it.

The record has no part in the queue: a worker holds its tasks by their leases alone.
"""

import asyncio
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any, Self

from afterward.engine import Engine
from afterward.errors import QueueError
from afterward.queue import Queue
from afterward.task import Record, Writes
from afterward.worker import Worker
from app.tasks.tools import Tools

COLLECTION = "workers"
MOST_LISTED = 500
EVERY_SECONDS = 10.0  # one small write of each worker
SILENT_SECONDS = 35.0  # a worker that is not seen for so long has crashed, hangs or is cut off
REMOVE_SECONDS = 1.0  # the longest that a database that hangs can hold up the stop


@dataclass(frozen=True, slots=True)
class WorkerView:
    """A worker, as the pages show it. A value that is missing in a damaged record is None."""

    owner: str
    host: str | None
    pid: int | None
    concurrency: int | None
    running: int | None
    started_at: float
    seen_at: float
    is_alive: bool

    @classmethod
    def of(cls, record: Record, now: float) -> Self:
        """Read a record. `now` is in seconds since the epoch."""
        body = record.body if isinstance(record.body, dict) else {}
        seen_at = _seen_at(record)
        host = body.get("host")
        return cls(
            owner=record.id,
            host=host if isinstance(host, str) else None,
            pid=_whole(body.get("pid")),
            concurrency=_whole(body.get("concurrency")),
            running=_whole(body.get("running")),
            started_at=record.created_at,
            seen_at=seen_at,
            is_alive=now - seen_at < SILENT_SECONDS,
        )


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) else None


def _seen_at(record: Record) -> float:
    body = record.body if isinstance(record.body, dict) else {}
    seen_at = body.get("seen_at")
    return seen_at if isinstance(seen_at, float | int) else record.created_at


async def list_workers(engine: Engine, now: float) -> list[WorkerView]:
    """Return the workers of all processes, those seen last first. Raises QueueUnavailable."""
    records = await engine.list_records(COLLECTION, client="", after=None, limit=MOST_LISTED)
    workers = [WorkerView.of(record, now) for record in records]
    return sorted(workers, key=lambda worker: worker.seen_at, reverse=True)


async def remove_silent_workers(engine: Engine, *, seen_before: float) -> None:
    """Remove the records of workers that were last seen before this time, after a crash."""
    for record in await engine.list_records(COLLECTION, client="", after=None, limit=MOST_LISTED):
        if _seen_at(record) < seen_before:
            await engine.delete_record(record)


@asynccontextmanager
async def announced(
    queue: Queue[Tools], worker: Worker[Tools], concurrency: int
) -> AsyncIterator[None]:
    """Keep the record of a worker during the block, and remove it at the end."""
    started_at = queue.now()
    writing = asyncio.create_task(_write_regularly(queue, worker, concurrency, started_at))
    try:
        yield
    finally:
        writing.cancel()
        await asyncio.wait([writing], timeout=REMOVE_SECONDS)
        with suppress(QueueError, TimeoutError):
            async with asyncio.timeout(REMOVE_SECONDS):
                await queue.engine.delete_record(_record(worker, {}, started_at))


async def _write_regularly(
    queue: Queue[Tools], worker: Worker[Tools], concurrency: int, started_at: float
) -> None:
    """Write the record every ten seconds, until cancelled. During an outage, try again then."""
    with suppress(QueueError):
        await _remove_predecessors(queue)
    facts = {"host": socket.gethostname(), "pid": os.getpid(), "concurrency": concurrency}
    while True:
        body = facts | {"running": worker.running, "seen_at": queue.now()}
        with suppress(QueueError):
            await queue.engine.put(Writes(records=(_record(worker, body, started_at),)))
        await asyncio.sleep(EVERY_SECONDS)


async def _remove_predecessors(queue: Queue[Tools]) -> None:
    """Remove the records of workers of this host whose processes have ended, after a crash.

    If two machines or containers have the same host name, one may remove the record of a living
    worker of the other, which writes it again within ten seconds.
    """
    host = socket.gethostname()
    for record in await queue.engine.list_records(
        COLLECTION, client="", after=None, limit=MOST_LISTED
    ):
        worker = WorkerView.of(record, queue.now())
        if worker.host == host and worker.pid is not None and not _is_another_process(worker.pid):
            await queue.engine.delete_record(record)


def _is_another_process(pid: int) -> bool:
    """Tell whether a process with this id runs, other than this one.

    In a container that starts again, the process before it had the same id, 1.
    """
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True  # a process of another user
    except (ProcessLookupError, OverflowError):
        return False
    return pid != os.getpid()


def _record(worker: Worker[Tools], body: dict[str, Any], started_at: float) -> Record:
    return Record(COLLECTION, "", worker.owner, body, started_at)
