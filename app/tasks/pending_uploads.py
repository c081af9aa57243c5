"""Records of uploads that have begun and are not committed yet; removes abandoned uploads."""

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import structlog

from afterward.errors import RecordNotFound
from afterward.queue import Queue
from afterward.task import Record, Writes
from app.tasks.tools import Tools
from app.tasks.uploads import remove_upload

COLLECTION = "pending_uploads"
PAGE = 500  # records in one query
HEARTBEAT_SECONDS = 300.0  # between two heartbeats; most uploads are over before the first

log = structlog.get_logger(__name__)


class PendingUploads:
    """Keeps a record of each upload in flight, until the upload is committed or abandoned.

    The request commits the record before it stores the first byte. The transaction that commits
    the upload removes the record. So the database alone decides the fate of a file:

    - If the clean-up removes the record first, the transaction of the upload fails.
    - If the transaction of the upload comes first, the clean-up finds no record.

    A file of another database has no record here, so the clean-up never removes it.
    """

    def __init__(self, queue: Queue[Tools]) -> None:
        self._queue = queue
        # Uploads of this process, and the time of each one's last heartbeat.
        self._in_flight: dict[str, tuple[Record, float]] = {}
        # All other records, and the time since which each is unchanged. Either another process has
        # the upload in flight, or a crash left the record behind.
        self._seen: dict[str, tuple[Record, float]] = {}

    @asynccontextmanager
    async def begin(self, upload_id: str) -> AsyncIterator[Record]:
        """Commit the record of an upload, and keep the upload in flight during the `with` block.

        Raises QueueUnavailable.
        """
        record = Record(COLLECTION, "", upload_id, {"heartbeat": 0}, self._queue.now())
        self._in_flight[upload_id] = record, time.monotonic()
        try:
            await self._queue.engine.put(Writes(records=(record,)))
            yield record
        finally:
            del self._in_flight[upload_id]

    async def write_heartbeats(self) -> None:
        """Write a heartbeat into the record of each upload that is in flight here.

        Other processes read it, and do not take the upload for abandoned. A record that is gone is
        not written again, because its upload was committed a moment ago. Raises QueueUnavailable.
        """
        now = time.monotonic()
        for upload_id, (record, beat_at) in list(self._in_flight.items()):
            if now - beat_at < HEARTBEAT_SECONDS:
                continue
            later = replace(record, body={"heartbeat": record.body["heartbeat"] + 1})
            await self._queue.engine.update_record(later)
            if upload_id in self._in_flight:
                self._in_flight[upload_id] = later, now

    async def remove_abandoned(self, silent_for: float) -> None:
        """Queue the removal of each upload that had no heartbeat for `silent_for` seconds.

        This process counts the seconds with its own monotonic clock, so that a wrong clock, here or
        on another machine, removes nothing. Raises QueueUnavailable.

        For example, upload A has heartbeat 3 when it is seen first, at 100 s. At 400 s it has
        heartbeat 4, so its silence begins again at 400 s. If its process crashes then, the call at
        4,000 s removes it, with `silent_for` = 3,600 s.
        """
        # 1. Read the records of all other uploads, and note since when each record is unchanged.
        now = time.monotonic()
        seen: dict[str, tuple[Record, float]] = {}
        async for record in self._all_records():
            if record.id not in self._in_flight:
                last_seen, since = self._seen.get(record.id, (record, now))
                seen[record.id] = record, since if record == last_seen else now
        # 2. Forget records that are gone: their uploads were committed, or given up.
        self._seen = seen
        # 3. Remove each record that has been unchanged for too long.
        for record, since in seen.values():
            if now - since >= silent_for:
                await self._remove(record)

    async def _all_records(self) -> AsyncIterator[Record]:
        """Read the records of all processes, newest first."""
        after = None
        while page := await self._queue.engine.list_records(
            COLLECTION, client="", after=after, limit=PAGE
        ):
            for record in page:
                yield record
            after = page[-1].id

    async def _remove(self, record: Record) -> None:
        """Remove the record, and queue the removal of the bytes, in one transaction."""
        try:
            async with self._queue.transaction() as transaction:
                transaction.remove_record(record)
                transaction.add_task(remove_upload, upload_id=record.id)
        except RecordNotFound:
            return  # the upload was committed, or another process was faster
        log.warning("abandoned upload is removed", upload_id=record.id)
