"""Uploads that have begun and are not committed yet, and the removal of abandoned ones."""

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
PAGE = 500  # records that are read at once
BEAT_SECONDS = 300.0  # between two heartbeats, so that most uploads need none

log = structlog.get_logger(__name__)


class PendingUploads:
    """Keeps a record of each upload that has begun, until the upload is committed or given up.

    The record is committed before the first byte is stored. The transaction that commits the
    upload removes it. So the database alone decides what becomes of a file: if the clean-up has
    removed the record first, that transaction fails; if the transaction came first, the clean-up
    finds no record. A file of another database has no record here, so it is never removed.
    """

    def __init__(self, queue: Queue[Tools]) -> None:
        self._queue = queue
        self._in_flight: dict[str, tuple[Record, float]] = {}  # here; and when it last beat
        self._seen: dict[str, tuple[Record, float]] = {}  # of others; and since when unchanged

    @asynccontextmanager
    async def begin(self, upload_id: str) -> AsyncIterator[Record]:
        """Commit the record of an upload that begins; the upload is in flight in the block.

        Raises QueueUnavailable.
        """
        record = Record(COLLECTION, "", upload_id, {"heartbeat": 0}, self._queue.now())
        self._in_flight[upload_id] = record, time.monotonic()
        try:
            await self._queue.engine.put(Writes(records=(record,)))
            yield record
        finally:
            del self._in_flight[upload_id]

    async def beat(self) -> None:
        """Tell other processes that the uploads in flight here are alive.

        A record that is gone stays gone: its upload was committed a moment ago.
        """
        now = time.monotonic()
        for upload_id, (record, beat_at) in list(self._in_flight.items()):
            if now - beat_at < BEAT_SECONDS:
                continue
            later = replace(record, body={"heartbeat": record.body["heartbeat"] + 1})
            await self._queue.engine.update_record(later)
            if upload_id in self._in_flight:
                self._in_flight[upload_id] = later, now

    async def remove_abandoned(self, silent_for: float) -> None:
        """Queue the removal of each upload without a heartbeat for so many seconds.

        The seconds are counted by this process, with the monotonic clock. Raises
        QueueUnavailable.
        """
        now = time.monotonic()
        seen: dict[str, tuple[Record, float]] = {}
        async for record in self._all():
            if record.id not in self._in_flight:
                before, since = self._seen.get(record.id, (record, now))
                seen[record.id] = record, since if record == before else now
        self._seen = seen
        for record, since in seen.values():
            if now - since >= silent_for:
                await self._remove(record)

    async def _all(self) -> AsyncIterator[Record]:
        """Every record, newest first."""
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
