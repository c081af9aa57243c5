"""Periodic work: what is finished and old is removed."""

import asyncio
from collections.abc import Callable

import structlog

from app.files.store import Store, StoreError
from app.queue.engine import Engine
from app.queue.errors import QueueError, RecordNotFound
from app.tasks.uploads import COLLECTION

DAY = 24 * 3600.0
EVERY_SECONDS = 10.0
AT_ONCE = 500  # rows removed in one transaction, so that requests are not kept waiting
ABANDONED_SECONDS = 3600.0  # an upload that has not grown into a promise by then never will

log = structlog.get_logger(__name__)


async def clean_up_regularly(
    engine: Engine, uploads: Store, *, retention_days: float, now: Callable[[], float]
) -> None:
    """Clean up every ten seconds until cancelled; what cannot be done now is done next time."""
    while True:
        try:
            await clean_up(engine, uploads, finished_before=now() - retention_days * DAY, now=now())
        except (QueueError, StoreError) as error:
            log.warning("clean-up put off", error=str(error))
        await asyncio.sleep(EVERY_SECONDS)


async def clean_up(engine: Engine, uploads: Store, *, finished_before: float, now: float) -> None:
    """Remove old finished tasks, old answers to idempotency keys, and abandoned uploads."""
    removed = 0
    while some := await engine.purge(
        finished_before=finished_before, answered_before=now - DAY, limit=AT_ONCE
    ):
        removed += some
    if removed:
        log.info("old tasks removed", rows=removed)
    await uploads.sweep(older_than=ABANDONED_SECONDS)
    for upload_id in await uploads.received(older_than=ABANDONED_SECONDS):
        try:
            await engine.read_record(COLLECTION, upload_id, client=None)
        except RecordNotFound:
            # The process died between the file's fsync and the commit: nobody was told of it.
            await uploads.delete(upload_id)
