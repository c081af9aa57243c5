"""A worker whose tasks leave marks in a file: the task's id, and the process that ran it.

`python -m tests.support.marks` works on QUEUE_URL, and adds a line to the file MARKS for each run.
The tests count these lines, because a count by the queue itself would prove little. WITHOUT removes
a protection, for negative controls: see `_weaken`.
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
from afterward.filter import TaskFilter
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
    """Sleep for `seconds`, then write the ids of this task and this process to the file."""
    await asyncio.sleep(seconds)
    _mark(context.tools, context.task.id)


async def die(_: Context[Path]) -> None:
    """Kill the process that runs this task."""
    os.kill(os.getpid(), signal.SIGKILL)


REGISTRY: Registry[Path] = Registry(leave_a_mark, die)


def _mark(marks: Path, task_id: str) -> None:
    with marks.open("a") as file:  # O_APPEND: lines of several processes do not mix
        file.write(f"{task_id} {os.getpid()}\n")


async def main() -> None:
    """Run a worker until SIGTERM."""
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
        case "crash-cap":  # a task may crash any number of processes
            sqlite_statements.MAX_CRASHES = 1_000_000  # type: ignore[attr-defined]
            postgres_statements.CLAIM = postgres_statements.CLAIM.replace(
                f"crashes + 1 >= {MAX_CRASHES}", "false"
            )
        case "suspicion":  # tasks that crashed together may run side by side again
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
    """Run waiting tasks without claiming them: list them, run them, and only then cancel them.

    Each of the TOGETHER workers waits until all of them have their first list. Without that wait,
    on a busy machine, the first worker could finish every task before the second has started.
    """
    list_waiting = partial(engine.list_tasks, TaskFilter(statuses=(Status.QUEUED,)), limit=10)
    tasks = await list_waiting()
    (marks.parent / f"listed-{os.getpid()}").touch()
    together = int(os.environ["TOGETHER"])
    all_have_listed = partial(_has_files, marks.parent, "listed-*", together)
    await asyncio.to_thread(until, all_have_listed, within=PATIENCE)
    while tasks:
        for task in tasks:
            _mark(marks, task.id)
            with contextlib.suppress(TaskHasStarted):
                await engine.cancel(task.id, time.time())
        tasks = await list_waiting()


def _has_files(directory: Path, pattern: str, number: int) -> bool:
    return len(list(directory.glob(pattern))) >= number


if __name__ == "__main__":
    asyncio.run(main())
