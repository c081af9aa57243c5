"""P16: the time to find tasks among 1,000,000 finished ones, in milliseconds.

The pages of `GET /tasks` are measured through HTTP. The counts, the groups of failures and the
changes of ten seconds, which no route returns as they are, are measured at the engine. Each query
runs 20 times, by itself, on SQLite and on PostgreSQL; the database is in the page cache.
"""

import asyncio
import http.client
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from http import HTTPStatus
from pathlib import Path
from urllib.parse import urlencode

from afterward.engine import Engine
from afterward.engines import open_engine
from afterward.filter import TaskFilter
from afterward.task import Status, Task
from benchmarks import record
from benchmarks.harness import Failed, Result, Spread, Target, progress
from benchmarks.load import server
from tests.support.postgres import Postgres, with_tables

TASKS, QUICK_TASKS = 1_000_000, 100_000
TIMES, QUICK_TIMES = 20, 10
AT_MOST = Target("≤", 5)  # milliseconds
DAY = 24 * 3600.0

Query = Callable[[Engine], Awaitable[object]]
Parameters = Mapping[str, str]


def measure(quick: bool) -> Iterator[Result]:
    """Measure SQLite, then PostgreSQL."""
    tasks = QUICK_TASKS if quick else TASKS
    times = QUICK_TIMES if quick else TIMES
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        postgres = stack.enter_context(Postgres())
        for name, url in (
            ("SQLite", f"sqlite:///{directory}/queue.db"),
            ("PostgreSQL", with_tables(postgres)),
        ):
            progress(f"{name}: writing {tasks:,} tasks")
            record.fill(url, tasks)
            sample, found = asyncio.run(_at_the_engine(url, times))
            found |= _through_http(directory, url, sample, times)
            for what, seconds in found.items():
                yield _result(f"{what}, on {name}", seconds)


def _result(what: str, seconds: list[float]) -> Result:
    milliseconds = Spread.of([1000 * each for each in seconds])
    return Result("P16", what, milliseconds, unit="ms", target=AT_MOST)


# At the engine


async def _at_the_engine(url: str, times: int) -> tuple[Task, dict[str, list[float]]]:
    """Return a task from the middle of the record, and the seconds of each query."""
    engine = open_engine(url)
    await engine.start()
    try:
        page = await engine.list_tasks(TaskFilter(until=time.time() - 3 * DAY), limit=100)
        sample = next(task for task in page if task.batch_id is not None)
        queries = _queries(sample)
        return sample, {what: await _time(engine, query, times) for what, query in queries.items()}
    finally:
        await engine.stop()


def _queries(sample: Task) -> dict[str, Query]:
    now = time.time()
    failed = (Status.FAILED,)
    return {
        "the number of failed tasks": _count(TaskFilter(statuses=failed)),
        "the number of failed tasks of a day": _count(TaskFilter(statuses=failed, since=now - DAY)),
        "the number of tasks with an error": _count(TaskFilter(error="PermanentError 550")),
        "the groups of failed tasks": lambda engine: engine.count_failures(""),
        "the tasks of a batch by status": lambda engine: engine.count_batch(
            str(sample.batch_id), client=""
        ),
        "the changes of ten seconds": lambda engine: engine.list_changed(
            "", since=now - 10, now=now, limit=5000
        ),
    }


def _count(wanted: TaskFilter) -> Query:
    return lambda engine: engine.count_tasks(wanted)


async def _time(engine: Engine, query: Query, times: int) -> list[float]:
    await query(engine)
    seconds = []
    for _ in range(times):
        began = time.perf_counter()
        await query(engine)
        seconds.append(time.perf_counter() - began)
    return seconds


# Through HTTP


def _through_http(directory: Path, url: str, sample: Task, times: int) -> dict[str, list[float]]:
    settings = {"QUEUE_URL": url, "WORKER_CONCURRENCY": "0"}
    with server(directory, "-m", "app", **settings) as running:
        connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=60)
        return {
            what: _get(connection, f"/tasks?{urlencode(parameters)}", times)
            for what, parameters in _pages(sample).items()
        }


def _pages(sample: Task) -> dict[str, Parameters]:
    since = datetime.fromtimestamp(time.time() - 2 * DAY, UTC)
    until = since + timedelta(hours=1)
    hour = {"since": since.isoformat(), "until": until.isoformat()}
    return {
        "the first page": {},
        "a page in the middle": {"after": sample.id},
        "the greatest page": {"limit": "100"},
        "status=succeeded": {"status": "succeeded"},
        "status=failed": {"status": "failed"},
        "status=queued,retrying": {"status": "queued,retrying"},
        "kind=send_email": {"kind": "send_email"},
        "kind= of a rare kind": {"kind": "remove_upload"},
        "kind= and status=": {"kind": "make_thumbnail", "status": "failed"},
        "about=": {"about": str(sample.about)},
        "batch_id=": {"batch_id": str(sample.batch_id)},
        "request_id=": {"request_id": str(sample.request_id)},
        "error=": {"error": "PermanentError 550"},
        "since= and until=, an hour": hour,
        "an hour, kind= and status=": hour | {"kind": "send_email", "status": "failed"},
        "an hour, error=": hour | {"error": "PermanentError 550"},
    }


def _get(connection: http.client.HTTPConnection, path: str, times: int) -> list[float]:
    seconds = []
    for _ in range(times + 1):
        began = time.perf_counter()
        connection.request("GET", path)
        response = connection.getresponse()
        body = response.read()
        seconds.append(time.perf_counter() - began)
        if response.status != HTTPStatus.OK:
            raise Failed(f"GET {path}: {response.status} {body!r}")
    return seconds[1:]
