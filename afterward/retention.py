"""Retention: remove finished tasks after a time, and stored responses after a day."""

import asyncio
import contextlib
from typing import Any

import structlog

from afterward.errors import QueueDamaged, QueueError
from afterward.queue import Queue
from afterward.task import ANSWERS_LIVE_SECONDS

EVERY_SECONDS = 10.0
AT_ONCE = 500  # rows removed in one transaction, so that requests wait only briefly for it

log = structlog.get_logger(__name__)


async def remove_regularly(
    queue: Queue[Any], keep_seconds: float, keep_failed_seconds: float
) -> None:
    """Remove old tasks and responses every ten seconds, until cancelled.

    A finished task stays for `keep_seconds`, a failed one for `keep_failed_seconds`. Errors
    are logged, and the next round tries again.
    """
    while True:
        try:
            now = queue.now()
            await remove_old(
                queue,
                finished_before=now - keep_seconds,
                failed_before=now - keep_failed_seconds,
            )
        except Exception as error:  # noqa: BLE001 -- the next round tries again
            with contextlib.suppress(Exception):  # the disk of the log may be full
                _log(error)
        raise_if_cancelled()
        await asyncio.sleep(EVERY_SECONDS)


def _log(error: Exception) -> None:
    if isinstance(error, QueueDamaged):
        return  # the engine has logged it, and it lasts until the next start
    if isinstance(error, QueueError):
        log.warning("retention put off", error=repr(error.__cause__ or error))
    else:
        log.error("retention failed", exc_info=error)


def raise_if_cancelled() -> None:
    """Raise CancelledError if the driver of the database has turned it into an error of its own.

    A loop that logs errors and goes on calls this, because it would not end otherwise.
    """
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


async def remove_old(queue: Queue[Any], *, finished_before: float, failed_before: float) -> None:
    """Remove the tasks that ended before these times, and responses that are older than a day.

    The times are in seconds since the epoch. Raises QueueUnavailable.
    """
    answered_before = queue.now() - ANSWERS_LIVE_SECONDS
    removed = 0
    while purged := await queue.engine.purge(
        finished_before=finished_before,
        failed_before=failed_before,
        answered_before=answered_before,
        limit=AT_ONCE,
    ):
        removed += purged
    if removed:
        log.info("old tasks removed", rows=removed)
