"""Periodic work of each process.

It writes the heartbeats of uploads in flight, and removes old tasks, stored responses, abandoned
uploads and the records of dead workers.
"""

import asyncio
from collections.abc import Awaitable

import structlog

from afterward.errors import QueueError
from afterward.queue import Queue
from afterward.retention import raise_if_cancelled, remove_old
from app.tasks.pending_uploads import PendingUploads
from app.tasks.tools import Tools
from app.tasks.workers import remove_silent_workers
from app.uploads.store import Store, StoreError, reason_of

DAY = 24 * 3600.0
EVERY_SECONDS = 10.0
ABANDONED_SECONDS = 3600.0  # an upload without a heartbeat for so long is removed

log = structlog.get_logger(__name__)


async def clean_up_regularly(
    queue: Queue[Tools],
    uploads: Store,
    pending: PendingUploads,
    *,
    keep_seconds: float,
    keep_failed_seconds: float,
) -> None:
    """Clean up every ten seconds until cancelled."""
    while True:
        now = queue.now()
        await clean_up(
            queue,
            uploads,
            pending,
            finished_before=now - keep_seconds,
            failed_before=now - keep_failed_seconds,
        )
        await asyncio.sleep(EVERY_SECONDS)


async def clean_up(
    queue: Queue[Tools],
    uploads: Store,
    pending: PendingUploads,
    *,
    finished_before: float,
    failed_before: float,
) -> None:
    """Write the heartbeats of uploads in flight, and then remove what is no longer needed.

    That is old finished tasks, old responses of idempotency keys, abandoned uploads, and the
    records of dead workers. The times are in seconds since the epoch. A step that fails is logged,
    and the other steps still run; the next round tries it again.
    """
    await _run_step(pending.write_heartbeats())
    await _run_step(remove_old(queue, finished_before=finished_before, failed_before=failed_before))
    await _run_step(uploads.sweep(older_than=ABANDONED_SECONDS))
    await _run_step(pending.remove_abandoned(silent_for=ABANDONED_SECONDS))
    await _run_step(remove_silent_workers(queue.engine, seen_before=queue.now() - DAY))


async def _run_step(step: Awaitable[object]) -> None:
    """Run a step of the clean-up, and log its error."""
    try:
        await step
    except (QueueError, StoreError) as error:
        log.warning("clean-up put off", error=str(error), reason=reason_of(error))
    except Exception:
        log.exception("clean-up failed")
    raise_if_cancelled()
