"""How much the backlog may still take: counted now and then, and not for each request."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from app.queue.errors import BacklogFull
from app.queue.task import FINISHED, Backlog

COUNTED_FOR_SECONDS = 1.0  # then other processes may have put some


class Room:
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

    @asynccontextmanager
    async def take(self, tasks: int) -> AsyncIterator[None]:
        """Take room for so many tasks, which are put inside. Raises BacklogFull."""
        asked_at = time.monotonic()
        if asked_at - self._counted_at > COUNTED_FOR_SECONDS or self._is_full(tasks):
            async with self._counting:
                if self._counted_at < asked_at:  # nobody has counted in the meantime
                    await self._count_again()
        if self._is_full(tasks):
            raise BacklogFull
        self._unfinished += tasks
        self._under_way += tasks
        try:
            yield
        finally:
            self._under_way -= tasks

    def _is_full(self, tasks: int) -> bool:
        return self._unfinished + tasks > self._limit

    async def _count_again(self) -> None:
        before = self._unfinished
        under_way, self._counted_at = self._under_way, time.monotonic()
        counts = (await self._count()).counts
        unfinished = sum(n for status, n in counts.items() if status not in FINISHED)
        taken_meanwhile = self._unfinished - before
        self._unfinished = unfinished + under_way + taken_meanwhile
