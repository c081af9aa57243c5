"""How much the backlog may still take: counted now and then, and not for each request."""

import asyncio
import time
from collections.abc import Awaitable, Callable

from afterward.errors import BacklogFull
from afterward.task import FINISHED, Backlog

COUNTED_FOR_SECONDS = 1.0  # then other processes may have put some


class BacklogLimit:
    """Lets at most `limit` tasks be unfinished at a time; `count` gives the backlog.

    Several processes may go over it together, by what they accept within a second.
    """

    def __init__(self, count: Callable[[], Awaitable[Backlog]], limit: int) -> None:
        self._count = count
        self._limit = limit
        self._unfinished = 0  # as far as is known; never less than what this process has put
        self._under_way = 0
        self._counted_at = float("-inf")
        self._counting = asyncio.Lock()

    async def take(self, tasks: int) -> None:
        """Take room for so many tasks, which are now to be put. Raises BacklogFull."""
        asked_at = time.monotonic()
        if self._must_count(tasks, asked_at):
            async with self._counting:
                if self._must_count(tasks, asked_at):  # nobody has in the meantime
                    await self._count_again()
        if self._is_full(tasks):
            raise BacklogFull
        self._unfinished += tasks
        self._under_way += tasks

    def have_put(self, tasks: int) -> None:
        """They have been put, or will not be: whoever has taken room says so."""
        self._under_way -= tasks

    def _must_count(self, tasks: int, asked_at: float) -> bool:
        # What has finished since is not known: nobody is refused before it is.
        may_be_old = 0.0 if self._is_full(tasks) else COUNTED_FOR_SECONDS
        return self._counted_at < asked_at - may_be_old

    def _is_full(self, tasks: int) -> bool:
        return tasks > 0 and self._unfinished + tasks > self._limit

    async def _count_again(self) -> None:
        began, before, under_way = time.monotonic(), self._unfinished, self._under_way
        try:
            counts = (await self._count()).counts
        finally:
            self._counted_at = began  # a failure too: who waits need not fail one after the other
        unfinished = sum(n for status, n in counts.items() if status not in FINISHED)
        taken_meanwhile = self._unfinished - before
        self._unfinished = unfinished + under_way + taken_meanwhile
