"""Several processes on one PostgreSQL: what the tests of this folder are made of.

What they prove is in their names; each claim has its negative control, without which it would prove
nothing. The short forms run with `make test`. The long ones are asked for by the environment:

    TASKS=100000   how many tasks four workers share             test_none_twice.py
    LEASE=30       the lease of a worker that is killed          test_a_worker_dies.py
    RESTARTS=20    how often PostgreSQL is restarted under load  test_postgres_faults.py
    KILLS=20       how often the API is killed under load        test_postgres_faults.py
    CUT_OFF=60     for how many seconds a worker is cut off      test_cut_off.py

for example

    TASKS=100000 python -m pytest -s tests/scale/test_none_twice.py
"""

import asyncio
import os
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from app.queue.engine import open_engine
from app.queue.queue import Queue
from app.queue.retry import RetryPolicy
from tests.scale.marks import CATALOGUE
from tests.support.service import COMMAND, Process

TASKS = int(os.environ.get("TASKS", "2000"))
LEASE = float(os.environ.get("LEASE", "2"))
RESTARTS = int(os.environ.get("RESTARTS", "2"))
CUT_OFF = float(os.environ.get("CUT_OFF", "3"))

WORKER = (*COMMAND, "worker")
MARKS = (sys.executable, "-m", "tests.scale.marks")
AT_ONCE = 500  # tasks put in one batch
UNFINISHED = (
    "SELECT count(*) FROM afterward.tasks WHERE status IN ('queued', 'running', 'retrying')"
)

Sql = Callable[[str], str]


def put(
    url: str, function: Callable[..., Awaitable[Any]], times: int, **arguments: Any
) -> set[str]:
    """Queue so many tasks, straight through the engine; gives their ids."""

    async def put_all() -> set[str]:
        engine = open_engine(url)
        await engine.start()
        queue = Queue(engine, CATALOGUE, RetryPolicy())
        ids: set[str] = set()
        while len(ids) < times:
            durable_tasks = queue.collect()
            for _ in range(min(AT_ONCE, times - len(ids))):
                ids.add(durable_tasks.add_task(function, **arguments).id)
            await queue.commit(durable_tasks.batch())
        await engine.stop()
        return ids

    return asyncio.run(put_all())


@contextmanager
def workers(directory: Path, count: int, **settings: object) -> Iterator[list[Process]]:
    """Workers that leave marks in the file `directory/marks`, each a process of its own."""
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
    """How often each task was run to its end, by the marks."""
    return Counter(line.split()[0] for line in (directory / "marks").read_text().splitlines())


def until(true: Callable[[], object], *, within: float, what: object = "") -> float:
    """Wait until something is true; gives how many seconds that took."""
    began = time.monotonic()
    while not true():
        assert time.monotonic() < began + within, f"not within {within} s {what}"
        time.sleep(0.05)
    return time.monotonic() - began
