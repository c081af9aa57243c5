"""A worker whose tasks leave marks outside the queue: who ran what, and how often.

`python -m tests.support.marks` works on QUEUE_URL, and adds a line to the file MARKS for each run.
WITHOUT takes one of its defences away, for negative controls: see `_weaken`.
"""

import asyncio
import contextlib
import os
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

from afterward.engine import Engine
from afterward.engines import open_engine
from afterward.engines.postgres import statements as postgres_statements
from afterward.engines.sqlite import statements as sqlite_statements
from afterward.engines.sqlite.engine import SQLite
from afterward.errors import TaskHasStarted
from afterward.queue import Queue
from afterward.registry import Registry
from afterward.retry import MAX_CRASHES, RetryPolicy
from afterward.task import Claim, Status
from afterward.task_log import TaskLog
from afterward.unit_of_work import Context
from afterward.worker import Worker
from app.observability.logs import configure_logging
from tests.support.service import PATIENCE, until


async def leave_a_mark(context: Context[Path], *, seconds: float = 0.0) -> None:
    """Take some time, then write down that this task was run, and by which process."""
    await asyncio.sleep(seconds)
    _mark(context.tools, context.task.id)


async def die(_: Context[Path]) -> None:
    """Take the process down with it."""
    os.kill(os.getpid(), signal.SIGKILL)


REGISTRY: Registry[Path] = Registry(leave_a_mark, die)


def _mark(marks: Path, task_id: str) -> None:
    with marks.open("a") as file:  # O_APPEND: lines of several processes do not mix
        file.write(f"{task_id} {os.getpid()}\n")


async def main() -> None:
    """Work until SIGTERM."""
    configure_logging("INFO", "json")
    marks = Path(os.environ["MARKS"])
    engine = open_engine(os.environ["QUEUE_URL"])
    await engine.start()
    without = os.environ.get("WITHOUT", "")
    _weaken(without)
    if without == "claims":
        await _work_carelessly(engine, marks)
    else:
        await _work(engine, marks)
    await engine.stop()


def _weaken(without: str) -> None:
    match without:
        case "crash-cap":  # a task may take as many processes with it as it likes
            sqlite_statements.MAX_CRASHES = 1_000_000  # type: ignore[attr-defined]
            postgres_statements.CLAIM = postgres_statements.CLAIM.replace(
                f"crashes + 1 >= {MAX_CRASHES}", "false"
            )
        case "suspicion":  # what was in one crash together runs together again
            claim = SQLite.claim

            async def claim_all(*args: Any, **kwargs: Any) -> Claim:
                claimed = Claim()
                while (some := await claim(*args, **kwargs | {"suspect": True})) != Claim():
                    claimed = Claim(
                        claimed.running + some.running, claimed.recovered + some.recovered
                    )
                return claimed

            SQLite.claim = claim_all  # type: ignore[method-assign]


async def _work(engine: Engine, marks: Path) -> None:
    ended = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
    queue = Queue(engine, REGISTRY, RetryPolicy())
    if "QUIET" not in os.environ:
        queue.events.subscribe(TaskLog().write)
    concurrency = int(os.environ.get("WORKER_CONCURRENCY", "10"))
    lease = float(os.environ.get("LEASE_SECONDS", "30"))
    worker = Worker(queue, marks, concurrency=concurrency, lease=lease)
    await worker.start()
    await ended.wait()
    await worker.stop(grace=5)


async def _work_carelessly(engine: Engine, marks: Path) -> None:
    """List the waiting tasks, run them, and only then cancel them, as the other workers do too.

    All TOGETHER workers have their first list before any of them goes on: else one of them could
    be done with all tasks, on a busy machine, before another has started.
    """
    look = partial(
        engine.list_tasks, client="", status=Status.QUEUED, kind=None, after=None, limit=10
    )
    tasks = await look()
    (marks.parent / f"looked-{os.getpid()}").touch()
    together = int(os.environ["TOGETHER"])
    all_looked = partial(_are_there, marks.parent, "looked-*", together)
    await asyncio.to_thread(until, all_looked, within=PATIENCE)
    while tasks:
        for task in tasks:
            _mark(marks, task.id)
            with contextlib.suppress(TaskHasStarted):
                await engine.cancel(task.id, time.time())
        tasks = await look()


def _are_there(directory: Path, pattern: str, number: int) -> bool:
    return len(list(directory.glob(pattern))) >= number


if __name__ == "__main__":
    asyncio.run(main())
