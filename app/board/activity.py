"""The tasks of the last hour, minute by minute, for the charts of the overview."""

import asyncio
import math
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
MOST_CLIENTS = 1000  # clients with counts in memory, about 20 MB in all
MOST_READ = 5_000  # tasks that one client's charts are read from after a start
PAGE = 100  # tasks in one query
ACCEPTED, SUCCEEDED, FAILED = range(3)  # the columns of a minute, in the order of Hour


@dataclass(frozen=True, slots=True)
class Hour:
    """The number of tasks in each minute of the last hour, the present minute last."""

    accepted: tuple[int, ...]
    succeeded: tuple[int, ...]
    failed: tuple[int, ...]


class Activity:
    """Counts the tasks of each client that are accepted, that succeed and that fail.

    `record` subscribes to the events of the queue, also to those of other processes. The counts are
    in memory. For the time before the start, and for a time whose events may be lost, they are read
    from the database when they are next asked for: from the newest MOST_READ tasks of a client, and
    from its newest MOST_READ failures. With 100 tasks a second these are the tasks of the last 50
    seconds, and with one task a second those of the whole hour. After a start, a success of a task
    that was accepted more than an hour ago is not counted.
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
        self._counts: OrderedDict[str, _MinuteCounts] = OrderedDict()  # by client
        self._complete_since = now()  # no client's counts since then have been dropped

    def record(self, event: Event) -> None:
        """Count an event of the queue."""
        task = event.task
        # A task that is queued again, by a retry, was updated after its creation.
        if event.type is EventType.QUEUED and task.created_at == task.updated_at:
            self._count(task.client, ACCEPTED, task.created_at)
        elif event.type is EventType.SUCCEEDED:
            self._count(task.client, SUCCEEDED, task.updated_at)
        elif event.type is EventType.FAILED:
            self._count(task.client, FAILED, task.updated_at)

    def _count(self, client: str, column: int, at: float) -> None:
        counts = self._counts_of(client)
        if at >= counts.since:  # earlier changes are read from the database
            counts.add(column, at)

    def catch_up(self, since: float) -> None:
        """Read the counts from this time on again, because events may be lost."""
        self._complete_since = now = self._now()
        for client, counts in self._counts.items():
            self._counts[client] = counts.without(since, now)

    async def last_hour(self, client: str) -> Hour:
        """Return the tasks of a client by minute. Raises QueueUnavailable."""
        counts = self._counts_of(client)
        self._counts.move_to_end(client)
        async with counts.reading:
            if counts.unread_since < counts.since:
                await self._read_database(client, counts)
                counts.unread_since = math.inf
        return counts.until(self._now())

    def _counts_of(self, client: str) -> "_MinuteCounts":
        """Return the counts of a client.

        If there are more than `most_clients`, drop the client whose chart was requested least
        recently.
        """
        counts = self._counts.get(client)
        if counts is None:
            counts = self._counts[client] = _MinuteCounts(self._complete_since)
            if len(self._counts) > self._most_clients:
                self._counts.popitem(last=False)
                self._complete_since = self._now()
        return counts

    async def _read_database(self, client: str, counts: "_MinuteCounts") -> None:
        """Count the newest tasks in the database that no event has counted.

        The failures are read by their own time, because a task may fail days after its acceptance.
        """
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
        failures = await self._engine.list_failed(client, limit=MOST_READ)
        earlier += [(FAILED, task.finished_at) for task in failures if task.finished_at is not None]
        for column, at in earlier:
            if counts.unread_since <= at < counts.since:
                counts.add(column, at)


def _changes(task: Task) -> list[tuple[int, float]]:
    """Return the times at which this task was accepted, and has succeeded, with their columns."""
    changes = [(ACCEPTED, task.created_at)]
    if task.status is Status.SUCCEEDED and task.finished_at is not None:
        changes.append((SUCCEEDED, task.finished_at))
    return changes


class _MinuteCounts:
    """The counts of one client: for each minute, the tasks accepted, succeeded and failed.

    Minutes are numbered since the epoch. Only the newest MINUTES are kept.
    """

    def __init__(
        self,
        since: float,
        unread_since: float = -math.inf,
        minutes: dict[int, list[int]] | None = None,
    ) -> None:
        self.since = since
        """The time from which on events are counted."""
        self.unread_since = unread_since
        """The counts from this time until `since` have to be read from the database."""
        self.reading = asyncio.Lock()
        self._minutes = minutes or {}

    def without(self, lost_since: float, now: float) -> "_MinuteCounts":
        """Return a copy that has to read the minutes since `lost_since` again.

        A read that still runs does not add to the copy.
        """
        unread_since = min(self.unread_since, lost_since // MINUTE * MINUTE)
        kept = {
            minute: row for minute, row in self._minutes.items() if minute * MINUTE < unread_since
        }
        return _MinuteCounts(now, unread_since, kept)

    def add(self, column: int, at: float) -> None:
        self._minutes.setdefault(int(at // MINUTE), [0, 0, 0])[column] += 1
        if len(self._minutes) > MINUTES:
            del self._minutes[min(self._minutes)]  # perhaps the minute that was just counted

    def until(self, now: float) -> Hour:
        last = int(now // MINUTE)
        minutes = range(last - MINUTES + 1, last + 1)
        rows = [self._minutes.get(minute, (0, 0, 0)) for minute in minutes]
        return Hour(*zip(*rows, strict=True))
