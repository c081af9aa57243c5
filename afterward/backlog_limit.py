"""A limit on the backlog: refuse new tasks while too many are unfinished."""

import asyncio
import time
from collections.abc import Awaitable, Callable

from afterward.errors import BacklogFull
from afterward.task import FINISHED, Backlog

COUNT_CACHED_SECONDS = 1.0


class BacklogLimit:
    """Lets at most `limit` tasks be unfinished at a time; `count` reads the backlog.

    Counting is a query, so the count is cached for a second, and the tasks that this process adds
    meanwhile are counted in memory. So the commits of one process never exceed the limit together.
    Three things may: several processes, by the tasks that they accept within a second; follow-ups,
    which are part of a promise that was accepted before; and tasks in transactions of the caller
    that are still open.

    With a limit of 1,000 and a count of 990 from half a second ago, ten tasks are accepted without
    a query. The eleventh needs a new count, because some of the 990 may have finished since.
    """

    def __init__(self, count: Callable[[], Awaitable[Backlog]], limit: int) -> None:
        self._count = count
        self._limit = limit
        self._unfinished = 0  # by the last count, and all tasks reserved since
        self._reserved = 0  # of these, the tasks whose commit has not ended
        self._counted_at = float("-inf")
        self._count_lock: asyncio.Lock  # see _lock
        self._loop: asyncio.AbstractEventLoop | None = None  # the loop that the lock belongs to

    async def reserve(self, tasks: int) -> None:
        """Reserve a place for each task of a commit that is about to begin. Raises BacklogFull."""
        await self._update_count(tasks)
        if self._is_full(tasks):
            raise BacklogFull
        self._add(tasks)

    async def reserve_up_to(self, tasks: int) -> int:
        """Reserve at most so many places, and return their number. Raises BacklogFull for none."""
        await self._update_count(tasks)
        places = min(tasks, self._limit - self._unfinished)
        if places <= 0:
            raise BacklogFull
        self._add(places)
        return places

    async def _update_count(self, tasks: int) -> None:
        asked_at = time.monotonic()
        if self._needs_count(tasks, asked_at):
            async with self._lock():
                # Another request may have counted while this one waited for the lock.
                if self._needs_count(tasks, asked_at):
                    await self._count_again()

    def _add(self, tasks: int) -> None:
        self._unfinished += tasks
        self._reserved += tasks

    def _lock(self) -> asyncio.Lock:
        """Return the lock of this event loop. An app that starts again has a new loop."""
        if self._loop is not (loop := asyncio.get_running_loop()):
            self._loop, self._count_lock = loop, asyncio.Lock()
        return self._count_lock

    def release(self, tasks: int) -> None:
        """End a reservation after the commit, whether it succeeded or failed.

        The next count tells which.
        """
        self._reserved -= tasks

    def _needs_count(self, tasks: int, asked_at: float) -> bool:
        # Tasks may have finished since the last count, so no request is refused by an old one.
        longest_age = 0.0 if self._is_full(tasks) else COUNT_CACHED_SECONDS
        return self._counted_at < asked_at - longest_age

    def _is_full(self, tasks: int) -> bool:
        return tasks > 0 and self._unfinished + tasks > self._limit

    async def _count_again(self) -> None:
        began, before, reserved = time.monotonic(), self._unfinished, self._reserved
        try:
            counts = (await self._count()).counts
        finally:
            # Also after a failure, so that waiting requests do not each wait for a failure of
            # their own.
            self._counted_at = began
        unfinished = sum(n for status, n in counts.items() if status not in FINISHED)
        # The count may lack the tasks that were being committed when it began, and those that were
        # reserved since. They are added, so that the sum is never too low.
        reserved_since = self._unfinished - before
        self._unfinished = unfinished + reserved + reserved_since
