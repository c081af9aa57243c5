"""PGQueuer's part: an entry for each attempt that is to be made, which carries a task's id alone.

PGQueuer claims entries (FOR UPDATE SKIP LOCKED), wakes those who wait for some, notes who is alive,
and hands over what somebody fell silent about. What became of a task is none of its business.
"""

import uuid
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, TypeAlias, cast

import asyncpg
from pgqueuer.adapters.persistence.qb import (
    QueryBuilderEnvironment,
    QueryQueueBuilder,
    QuerySchedulerBuilder,
)
from pgqueuer.db import AsyncpgDriver
from pgqueuer.domain.settings import DBSettings, Durability
from pgqueuer.queries import EntrypointExecutionParameter, Queries
from pgqueuer.types import JOB_STATUS, JobId, QueueEntrypoint, QueueManagerId
from pydantic_settings import PydanticBaseSettingsSource

from app.queue.task import Status, Task

Session: TypeAlias = "asyncpg.Connection[Any] | asyncpg.pool.PoolConnectionProxy[Any]"

SCHEMA = "afterward"
CHANNEL = "afterward_entries"
_ENTRYPOINT = QueueEntrypoint("task")
_ENTRYPOINTS = {_ENTRYPOINT: EntrypointExecutionParameter(concurrency_limit=0)}

# PGQueuer takes the highest priority first, and the oldest entry of those. So ours is the time at
# which a task is due, in seconds and backwards: it fits 32 bits until 2106.
_PRIORITY_AT_EPOCH = 2**31 - 1

# How PGQueuer's own statistics are to count the end of an entry.
_ENDS: dict[Status, JOB_STATUS] = {
    Status.SUCCEEDED: "successful",
    Status.RETRYING: "exception",
    Status.FAILED: "exception",
    Status.QUEUED: "deleted",
    Status.CANCELLED: "canceled",
}


class _Names(DBSettings):
    """The names of PGQueuer's tables; nobody's environment variables change them."""

    @classmethod
    def settings_customise_sources(  # type: ignore[override]
        cls, _: Any, init_settings: PydanticBaseSettingsSource, **__: Any
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (init_settings,)


# Balanced: entries survive a crash of the database, PGQueuer's log and statistics need not.
NAMES = _Names(db_schema=SCHEMA, channel=CHANNEL, durability=Durability.balanced)
_ENVIRONMENT = QueryBuilderEnvironment(NAMES)
_QUEUE = QueryQueueBuilder(NAMES)
_SCHEDULES = QuerySchedulerBuilder(NAMES)


def queries_on(session: Session) -> Queries:
    """PGQueuer's statements, on this connection and in its transaction."""
    driver = AsyncpgDriver(cast("asyncpg.Connection[Any]", session))
    return Queries(driver, _ENVIRONMENT, _QUEUE, _SCHEDULES)


async def enter(session: Session, tasks: Sequence[Task]) -> Sequence[int]:
    """Make an entry for the next attempt of each task; gives their ids."""
    return await queries_on(session).enqueue(
        [_ENTRYPOINT] * len(tasks),
        [task.id.encode() for task in tasks],
        [_PRIORITY_AT_EPOCH - int(task.due_at) for task in tasks],
        # Relative, so that it does not matter whose clock is right.
        [timedelta(seconds=task.due_at - task.updated_at) for task in tasks],
    )


async def take(
    session: Session, owner: str, *, limit: int, silence: float
) -> list[tuple[int, str]]:
    """Claim up to `limit` entries that are due, or whose owner was silent for so many seconds.

    Gives each with the id of the task it stands for.
    """
    jobs = await queries_on(session).dequeue(
        limit,
        _ENTRYPOINTS,
        QueueManagerId(uuid.uuid5(uuid.NAMESPACE_URL, owner)),
        global_concurrency_limit=None,
        heartbeat_timeout=timedelta(seconds=silence),
    )
    return [(job.id, (job.payload or b"").decode()) for job in jobs]


async def beat(session: Session, entries: Sequence[int]) -> None:
    """Say that whoever claimed these entries is alive."""
    await queries_on(session).update_heartbeat([JobId(entry) for entry in entries])


async def remove(session: Session, entries: Sequence[tuple[int, Status]]) -> None:
    """Remove entries; each with how its task's attempt ended."""
    await session.execute(
        _QUEUE.build_log_job_query(),
        [entry for entry, _ in entries],
        [_ENDS[status] for _, status in entries],
        [None] * len(entries),
    )


async def pull_forward(session: Session, longest_wait: float) -> None:
    """Make due what waits for longer, and heartbeats of the future ones of now."""
    entries = NAMES.qualified.queue_table
    await session.execute(
        f"""
        UPDATE {entries} SET execute_after = NOW()
        WHERE entrypoint = '{_ENTRYPOINT}' AND status = 'queued' AND execute_after > NOW() + $1
        """,
        timedelta(seconds=longest_wait),
    )
    await session.execute(
        f"UPDATE {entries} SET heartbeat = NOW() WHERE status = 'picked' AND heartbeat > NOW()"
    )


async def prune(session: Session, *, larger_than: int) -> None:
    """Empty PGQueuer's log once it takes more than so many bytes; nobody else does."""
    log = NAMES.qualified.queue_table_log
    if await session.fetchval(f"SELECT pg_total_relation_size('{log}')") > larger_than:
        await queries_on(session).clear_queue_log()
