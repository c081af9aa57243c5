"""Start several workers on one database, and count the marks that their tasks leave."""

import asyncio
import sys
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from afterward.engines import open_engine
from afterward.queue import Queue
from afterward.retry import RetryPolicy
from afterward.task import Task
from tests.support.marks import REGISTRY
from tests.support.service import COMMAND, Process

WORKER = (*COMMAND, "worker")
MARKS = (sys.executable, "-m", "tests.support.marks")
AT_ONCE = 500  # tasks in one transaction
UNFINISHED = (
    "SELECT count(*) FROM afterward.tasks WHERE status IN ('queued', 'running', 'retrying')"
)


def put(
    url: str, function: Callable[..., Coroutine[Any, Any, Any]], times: int, **arguments: Any
) -> set[str]:
    """Queue `times` tasks without the API, and return their ids."""

    async def put_all() -> set[str]:
        engine = open_engine(url)
        await engine.start()
        queue = Queue(engine, REGISTRY, RetryPolicy())
        ids: set[str] = set()
        while len(ids) < times:
            durable_tasks = queue.collect()
            for _ in range(min(AT_ONCE, times - len(ids))):
                ids.add(durable_tasks.add_task(function, **arguments).id)
            await queue.commit(durable_tasks.collected())
        await engine.stop()
        return ids

    return asyncio.run(put_all())


def read(url: str, task_id: str) -> Task:
    """Return a task from the database. On SQLite, no other process may use the file meanwhile."""

    async def read_one() -> Task:
        engine = open_engine(url)
        await engine.start()
        task = await engine.get(task_id)
        await engine.stop()
        return task

    return asyncio.run(read_one())


@contextmanager
def workers(directory: Path, count: int, **settings: object) -> Iterator[list[Process]]:
    """Yield `count` worker processes. Their tasks leave marks in the file `directory/marks`."""
    marks = directory / "marks"
    marks.touch()
    with ExitStack() as stack:
        yield [
            stack.enter_context(
                Process(directory / f"worker-{number}", command=MARKS, marks=marks, **settings)
            )
            for number in range(count)
        ]


def runs(directory: Path) -> Counter[str]:
    """Return how often each task ran to its end, by the marks."""
    return Counter(line.split()[0] for line in _lines(directory))


def processes(directory: Path) -> int:
    """Return how many processes left marks."""
    return len({line.split()[1] for line in _lines(directory)})


def _lines(directory: Path) -> list[str]:
    return (directory / "marks").read_text().splitlines()
