"""Repeat a database operation until it succeeds, with growing pauses.

Each failure is a log line, except QueueDamaged: the engine has logged the damage itself.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import TypeVar

import structlog

from afterward.errors import QueueDamaged, QueueUnavailable

FIRST_PAUSE_SECONDS = 0.1
LONGEST_PAUSE_SECONDS = 5.0

ResultT = TypeVar("ResultT")

log = structlog.get_logger(__name__)


async def keep_trying(
    operation: Callable[[], Awaitable[ResultT]], *, skip_pause: asyncio.Event | None = None
) -> ResultT:
    """Return the result of `operation`, which is repeated until it succeeds.

    A full disk or a locked database passes, so QueueUnavailable is only logged. So is any other
    error: a worker that ended here would leave an app that accepts tasks and runs none. The
    pauses are 0.1 s, 0.2 s, 0.4 s ... 5 s. When `skip_pause` is set, they end at once.
    """
    pause = FIRST_PAUSE_SECONDS
    this = asyncio.current_task()
    assert this is not None
    cancellations = this.cancelling()
    while True:
        try:
            return await operation()
        except Exception as error:
            # The driver may turn a cancellation into a timeout of its own: asyncpg does.
            if this.cancelling() > cancellations:
                raise asyncio.CancelledError from error
            with contextlib.suppress(Exception):  # the disk of the log may be full too
                _log(error, pause)
        await _pause(pause, until=skip_pause)
        pause = min(pause * 2, LONGEST_PAUSE_SECONDS)


def _log(error: Exception, pause: float) -> None:
    if isinstance(error, QueueDamaged):
        return  # it lasts until the next start, so there would be a line every five seconds
    if isinstance(error, QueueUnavailable):
        log.warning("database refuses", error=repr(error.__cause__ or error), again_in=pause)
    else:
        log.error("database fails", again_in=pause, exc_info=error)


async def _pause(seconds: float, *, until: asyncio.Event | None) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await (until or asyncio.Event()).wait()
