"""The tasks of the last hour, minute by minute, for the charts of the overview."""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from afterward.engine import Engine
from afterward.events import Event, EventType
from afterward.filter import TaskFilter
from afterward.task import Status, Task

MINUTE = 60.0
MINUTES = 60
MOST_CLIENTS = 1000  # whose tasks are counted at a time; about 20 MB
MOST_READ = 5_000  # tasks that one client's charts are read from after a start
PAGE = 100  # tasks in one query


@dataclass(frozen=True, slots=True)
class Hour:
    """The number of tasks in each minute of the last hour, the present minute last."""

    accepted: tuple[int, ...]
    succeeded: tuple[int, ...]
    failed: tuple[int, ...]


class Activity:
    """Counts the tasks of each client that are accepted, that succeed and that fail.

    `record` subscribes to the events of the queue, also to those of other processes. The counts are
    in memory. For the time before the start, they are read from the database when they are first
    asked for: from the newest MOST_READ tasks of a client. With 100 tasks a second these are the
    tasks of the last 50 seconds, and with one task a second those of the whole hour.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        most_clients: int = MOST_CLIENTS,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._engine = engine
        self._most_clients = most_clients
        self._now = now
        self._counts: OrderedDict[str, _Counts] = OrderedDict()  # by client
        self._complete_since = now()  # nothing that was counted since then is forgotten

    def record(self, event: Event) -> None:
        """Count an event of the queue."""
        task = event.task
        # A task that is queued again, by a retry, was updated after its creation.
        if event.type is EventType.QUEUED and task.created_at == task.updated_at:
            self._counts_of(task.client).add(0, task.created_at)
        elif event.type is EventType.SUCCEEDED:
            self._counts_of(task.client).add(1, task.updated_at)
        elif event.type is EventType.FAILED:
            self._counts_of(task.client).add(2, task.updated_at)

    async def last_hour(self, client: str) -> Hour:
        """Return the tasks of a client by minute. Raises QueueUnavailable."""
        counts = self._counts_of(client)
        self._counts.move_to_end(client)
        async with counts.reading:
            if not counts.is_read:
                await self._read_record(client, counts)
                counts.is_read = True
        return counts.until(self._now())

    def _counts_of(self, client: str) -> "_Counts":
        """Return the counts of a client. For a further client, forget the one asked for longest."""
        counts = self._counts.get(client)
        if counts is None:
            counts = self._counts[client] = _Counts(self._complete_since)
            if len(self._counts) > self._most_clients:
                self._counts.popitem(last=False)
                self._complete_since = self._now()
        return counts

    async def _read_record(self, client: str, counts: "_Counts") -> None:
        """Count the newest tasks in the database, as far as no event has counted them."""
        wanted = TaskFilter(client=client, since=self._now() - MINUTES * MINUTE)
        after, left = None, MOST_READ
        earlier: list[tuple[int, float]] = []
        while left > 0:
            tasks = await self._engine.list_tasks(wanted, after=after, limit=PAGE)
            for task in tasks:
                earlier += _changes(task)
            if len(tasks) < PAGE:
                break
            after, left = tasks[-1].id, left - PAGE
        for column, at in earlier:
            if at < counts.since:
                counts.add(column, at)


def _changes(task: Task) -> list[tuple[int, float]]:
    """Return the columns of _Counts in which this task counts, and the times."""
    changes = [(0, task.created_at)]
    if task.finished_at is not None and task.status in _FINAL_COLUMNS:
        changes.append((_FINAL_COLUMNS[task.status], task.finished_at))
    return changes


_FINAL_COLUMNS = {Status.SUCCEEDED: 1, Status.FAILED: 2}


class _Counts:
    """The counts of one client: for each minute, the tasks accepted, succeeded and failed.

    Minutes are numbered since the epoch. Only the newest MINUTES are kept.
    """

    def __init__(self, since: float) -> None:
        self.since = since
        """Since when events are counted. What came before has to be read from the database."""
        self.is_read = False
        self.reading = asyncio.Lock()
        self._minutes: dict[int, list[int]] = {}

    def add(self, column: int, at: float) -> None:
        self._minutes.setdefault(int(at // MINUTE), [0, 0, 0])[column] += 1
        if len(self._minutes) > MINUTES:
            del self._minutes[min(self._minutes)]  # perhaps the minute that was just counted

    def until(self, now: float) -> Hour:
        last = int(now // MINUTE)
        minutes = range(last - MINUTES + 1, last + 1)
        rows = [self._minutes.get(minute, (0, 0, 0)) for minute in minutes]
        return Hour(*zip(*rows, strict=True))
