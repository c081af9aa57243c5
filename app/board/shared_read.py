"""A read that all viewers share, so that its cost does not grow with their number."""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

ResultT = TypeVar("ResultT")

REUSED_SECONDS = 1.0
# A result is reused for ten times as long as the read took. So a slow read, such as a count of a
# million tasks, takes at most a tenth of the time. But no result is older than LONGEST_REUSED.
REUSED_TIMES = 10.0
LONGEST_REUSED = 30.0
MOST_READS = 1000  # that are kept for reuse

_now = time.monotonic


class SharedRead(Generic[ResultT]):
    """A function whose result is reused for a while. Callers share a running call, too.

    An error is raised to the callers that share the call; the next caller tries again.
    """

    def __init__(
        self, read: Callable[[], Awaitable[ResultT]], *, reused: float = REUSED_SECONDS
    ) -> None:
        self._read = read
        self._reused = reused
        self._running: asyncio.Task[ResultT] | None = None
        self._reused_until = 0.0

    async def get(self) -> ResultT:
        """Return a result that may be some seconds old."""
        if self._running is None or (self._running.done() and self._is_old(self._running)):
            self._running = asyncio.create_task(self._read_and_time())
            self._running.add_done_callback(_mark_as_seen)
        return await asyncio.shield(self._running)  # if one caller is cancelled, others still wait

    @property
    def pause(self) -> float:
        """The seconds until `get` reads again."""
        return max(0.0, self._reused_until - _now())

    def _is_old(self, running: asyncio.Task[ResultT]) -> bool:
        return _now() >= self._reused_until or running.cancelled() or bool(running.exception())

    async def _read_and_time(self) -> ResultT:
        began = _now()
        result = await self._read()
        ended = _now()
        reused = max(self._reused, REUSED_TIMES * (ended - began))
        self._reused_until = ended + min(reused, LONGEST_REUSED)
        return result


class SharedReads(Generic[ResultT]):
    """A shared read for each key, for the MOST_READS keys that were used last."""

    def __init__(self) -> None:
        self._reads: OrderedDict[str, SharedRead[ResultT]] = OrderedDict()

    def of(self, key: str, read: Callable[[], Awaitable[ResultT]]) -> SharedRead[ResultT]:
        """Return the shared read with this key. A new one calls `read`."""
        if key not in self._reads:
            self._reads[key] = SharedRead(read)
            if len(self._reads) > MOST_READS:
                self._reads.popitem(last=False)
        self._reads.move_to_end(key)
        return self._reads[key]


def _mark_as_seen(ended: asyncio.Task[ResultT]) -> None:
    """Keep asyncio from logging an error that no caller waited for, because all were cancelled."""
    if not ended.cancelled():
        ended.exception()
