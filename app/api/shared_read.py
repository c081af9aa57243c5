"""A read that all callers share, so that its cost does not grow with their number."""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import Any, Generic, TypeVar, TypeVarTuple

ResultT = TypeVar("ResultT")
ArgumentTs = TypeVarTuple("ArgumentTs")

REUSED_SECONDS = 1.0
# A result is reused for ten times as long as the read took. So a slow read, such as a count of a
# million tasks, takes at most a tenth of the time. But no result is older than LONGEST_REUSED.
REUSED_TIMES = 10.0
LONGEST_REUSED = 30.0
MOST_READS = 1000  # that are kept for reuse

_now = time.monotonic


class SharedRead(Generic[ResultT]):
    """A function whose result is reused for a while. Callers share a running call, too.

    The result is reused for `reused` seconds, and longer if the read is slow, but at most for
    `longest` seconds. An error is raised to the callers that share the call; the next caller tries
    again.
    """

    def __init__(
        self,
        read: Callable[[], Awaitable[ResultT]],
        *,
        reused: float = REUSED_SECONDS,
        longest: float = LONGEST_REUSED,
    ) -> None:
        self._read = read
        self._reused = reused
        self._longest = longest
        self._running: asyncio.Task[ResultT] | None = None
        self._reused_until = 0.0

    async def get(self) -> ResultT:
        """Return a result that may be some seconds old."""
        if self._running is None or (self._running.done() and self._is_old(self._running)):
            self._running = asyncio.create_task(self._read_and_time())
            self._running.add_done_callback(_mark_as_seen)
        return await asyncio.shield(self._running)  # if one caller is cancelled, others still wait

    async def get_newer(self) -> ResultT:
        """Wait until `get` may read again, and return a result of a read that begins after now.

        A read that runs already is not shared, because it may miss what has just changed.
        """
        if self._running is not None:
            await asyncio.wait([self._running])
        await asyncio.sleep(max(0.0, self._reused_until - _now()))
        return await self.get()

    def _is_old(self, running: asyncio.Task[ResultT]) -> bool:
        return _now() >= self._reused_until or running.cancelled() or bool(running.exception())

    async def _read_and_time(self) -> ResultT:
        began = _now()
        result = await self._read()
        ended = _now()
        reused = max(self._reused, REUSED_TIMES * (ended - began))
        self._reused_until = ended + min(reused, self._longest)
        return result


class SharedReads:
    """A shared read for each function and its arguments: the MOST_READS that were used last."""

    def __init__(self) -> None:
        self._reads: OrderedDict[Any, SharedRead[Any]] = OrderedDict()

    def of(
        self, read: Callable[[*ArgumentTs], Awaitable[ResultT]], *arguments: *ArgumentTs
    ) -> SharedRead[ResultT]:
        """Return the shared read that calls `read` with these arguments."""
        key = read, arguments
        if key not in self._reads:
            self._reads[key] = SharedRead(lambda: read(*arguments))
            if len(self._reads) > MOST_READS:
                self._reads.popitem(last=False)
        self._reads.move_to_end(key)
        return self._reads[key]


def _mark_as_seen(ended: asyncio.Task[ResultT]) -> None:
    """Keep asyncio from logging an error that no caller waited for, because all were cancelled."""
    if not ended.cancelled():
        ended.exception()
