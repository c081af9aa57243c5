"""The numbers of the overview: read at most once a second for all viewers of a client."""

import asyncio
from dataclasses import dataclass
from functools import partial

from markupsafe import Markup

from afterward.engine import Engine
from afterward.filter import TaskFilter
from afterward.queue import Queue
from afterward.task import WAITING, Status, Task
from app.api.health_checks import CheckResults, Health
from app.api.pages import render
from app.api.shared_read import SharedRead, SharedReads
from app.board.activity import Activity, Hour
from app.board.charts import bars
from app.board.error_line import error_line
from app.tasks.tools import Tools
from app.tasks.workers import WorkerView, list_workers

LATEST_FAILURES = 5
# A check writes to the disk, and logs in to the SMTP server. So an open dashboard asks for it less
# often than for the numbers, and no page waits long for it.
HEALTH_REUSED_SECONDS = 10.0
HEALTH_WAIT_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Numbers:
    """The state of a client's tasks.

    Without API keys, `waiting`, `running` and `oldest_due_at` are those of all tasks, because the
    database keeps their counts. The rest is of the tasks without a client.
    """

    waiting: int
    running: int
    oldest_due_at: float | None
    hour: Hour
    failures: list[Task]
    workers: list[WorkerView]
    has_tasks: bool


class OverviewNumbers:
    """Reads and renders the numbers of the overview."""

    def __init__(
        self, queue: Queue[Tools], health: Health, activity: Activity, reads: SharedReads
    ) -> None:
        self._queue = queue
        self.now = queue.now
        self._activity = activity
        self._health = SharedRead(health.check, reused=HEALTH_REUSED_SECONDS)
        self._last_health: CheckResults | None = None
        self._reads = reads

    async def read(self, client: str) -> Numbers:
        """Return a client's numbers, which may be some seconds old. Raises QueueUnavailable."""
        return await self._reads.of(self._read, client).get()

    async def read_newer(self, client: str) -> Numbers:
        """Wait until the numbers may be read again, and read them. Raises QueueUnavailable."""
        return await self._reads.of(self._read, client).get_newer()

    async def html(self, numbers: Numbers, prefix: str) -> Markup:
        """Render the part of the overview that changes.

        It waits at most a second for the health checks.
        """
        return render(
            "board/numbers.html",
            prefix=prefix,
            numbers=numbers,
            charts=_charts(numbers.hour),
            error_line=error_line,
            failed_in_hour=sum(numbers.hour.failed),
            health=await self._current_health(),
            now=self._queue.now(),
        )

    async def _read(self, client: str) -> Numbers:
        engine = self._queue.engine
        (waiting, running, oldest_due_at), hour, failures, workers = await asyncio.gather(
            _count_unfinished(engine, client),
            self._activity.last_hour(client),
            engine.list_failed(client, limit=LATEST_FAILURES),
            list_workers(engine, self._queue.now()),
        )
        has_tasks = bool(
            waiting
            or running
            or failures
            or sum(hour.accepted)
            or await engine.list_tasks(TaskFilter(client=client), limit=1)
        )
        return Numbers(
            waiting=waiting,
            running=running,
            oldest_due_at=oldest_due_at,
            hour=hour,
            failures=failures,
            workers=workers,
            has_tasks=has_tasks,
        )

    async def _current_health(self) -> CheckResults | None:
        """Return the last result of the health checks; None while the first checks still run."""
        try:
            async with asyncio.timeout(HEALTH_WAIT_SECONDS):
                self._last_health = await self._health.get()
        except TimeoutError:
            pass
        return self._last_health


async def _count_unfinished(engine: Engine, client: str) -> tuple[int, int, float | None]:
    """Return the number of waiting and of running tasks, and when the oldest became due.

    Where the service has API keys, only the client's own tasks count, and the oldest is the oldest
    queued task: retries are left out (see Engine.oldest_queued).
    """
    if client:
        of_status = partial(TaskFilter, client=client)
        return await asyncio.gather(
            engine.count_tasks(of_status(statuses=WAITING)),
            engine.count_tasks(of_status(statuses=(Status.RUNNING,))),
            engine.oldest_queued(client),
        )
    backlog = await engine.backlog()
    waiting = sum(backlog.counts[status] for status in WAITING)
    return waiting, backlog.counts[Status.RUNNING], backlog.oldest_due_at


@dataclass(frozen=True, slots=True)
class Chart:
    """A chart of the last hour, and the numbers beside it."""

    title: str
    svg: Markup
    total: int
    highest: int


def _charts(hour: Hour) -> list[Chart]:
    columns = [
        ("Accepted", hour.accepted, ""),
        ("Succeeded", hour.succeeded, "succeeded"),
        ("Failed", hour.failed, "failed"),
    ]
    return [
        Chart(
            title,
            svg=bars(values, title=f"{title} tasks by minute", status=status),
            total=sum(values),
            highest=max(values),
        )
        for title, values, status in columns
    ]
