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
from pgqueuer.queries import Queries
from pgqueuer.types import JOB_STATUS, JobId, QueueEntrypoint, QueueManagerId
from pydantic_settings import PydanticBaseSettingsSource

from app.queue.task import Status

Entrypoint: TypeAlias = QueueEntrypoint
Session: TypeAlias = "asyncpg.Connection[Any] | asyncpg.pool.PoolConnectionProxy[Any]"

SCHEMA = "afterward"
CHANNEL = "afterward_entries"
AT_ONCE = 1000  # entries in one statement: others wait while more are encoded

# PGQueuer's name for kinds of work. What was running when a worker died is claimed by itself.
TASK = QueueEntrypoint("task")
SUSPECT = QueueEntrypoint("suspect")

# PGQueuer takes the highest priority first, and the oldest entry of those. So ours is the time at
# which a task is due, in seconds and backwards: it fits 32 bits until 2106.
_PRIORITY_AT_EPOCH = 2**31 - 1

# How PGQueuer's own statistics are to count the end of an entry.
ENDS: dict[Status, JOB_STATUS] = {
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
_TABLE = NAMES.qualified.queue_table


def queries_on(session: Session) -> Queries:
    """PGQueuer's statements, on this connection and in its transaction."""
    driver = AsyncpgDriver(cast("asyncpg.Connection[Any]", session))
    return Queries(driver, _ENVIRONMENT, _QUEUE, _SCHEDULES)


NEXT = f"nextval('{_TABLE}_id_seq')"
"""The number of another entry."""

ENTER = f"""entered AS (
    INSERT INTO {_TABLE} (id, entrypoint, payload, status, priority, execute_after)
    SELECT entry, CASE WHEN crashes > 0 THEN '{SUSPECT}' ELSE '{TASK}' END,
           convert_to(id, 'UTF8'), 'queued',
           ({_PRIORITY_AT_EPOCH} - floor(due_at))::int,
           -- Relative, so that it does not matter whose clock is right.
           now() + (due_at - updated_at) * interval '1 second'
    FROM new
)"""
"""Makes the `entry` of each of `new`, which are tasks. Comes after that."""

# Claiming and removing are PGQueuer's. A statement of its own is a chain of named parts (WITH) and
# an end. Ours have its parts in them, and do besides what is to be done with the row: one round
# trip, and one transaction.


def _divided(statement: str, end: str) -> tuple[str, str]:
    """The parts of a statement, and its end, which begins with this word."""
    parts, found, rest = statement.rpartition(end)
    return parts, found + rest


TAKE, _ = _divided(
    _QUEUE.build_dequeue_query(
        batch_size=0,
        entrypoints=[TASK],
        concurrency_limits=[0],
        queue_manager_id=QueueManagerId(uuid.UUID(int=0)),
        global_concurrency_limit=None,
        heartbeat_timeout=timedelta(),
    ).sql,
    "SELECT",
)
"""Claims the entries of `taking`; they are `claimed`. Comes first."""

_removes, _logs = _divided(_QUEUE.build_log_job_query(), "INSERT")
_removes = f"{_removes.replace('WITH', '', 1)}, logged AS ({_logs})"
_removes = _removes.replace("$1", "ARRAY(SELECT entry FROM ended)")
_removes = _removes.replace("$2", "ARRAY(SELECT ending FROM ended)")
REMOVE = _removes.replace("$3", "'{}'")
"""Removes each `entry` of `ended`, whose `ending` is one of ENDS. Comes after that."""


def taking(entrypoint: Entrypoint, owner: str, *, limit: int, silence: float) -> tuple[Any, ...]:
    """The first four arguments of a statement that begins with TAKE.

    Up to `limit` entries that are due, or whose owner was silent for so many seconds.
    """
    manager = uuid.uuid5(uuid.NAMESPACE_URL, owner)
    return limit, [entrypoint], manager, timedelta(seconds=silence)


async def beat(session: Session, entries: Sequence[int]) -> None:
    """Say that whoever claimed these entries is alive."""
    await queries_on(session).update_heartbeat([JobId(entry) for entry in entries])


async def drop(session: Session, entries: Sequence[int]) -> None:
    """Remove entries that mean nothing."""
    await session.execute(
        _QUEUE.build_log_job_query(),
        entries,
        [ENDS[Status.CANCELLED]] * len(entries),
        [None] * len(entries),
    )


async def pull_forward(session: Session, longest_wait: float) -> None:
    """Make due what waits for longer, and heartbeats of the future ones of now."""
    await session.execute(
        f"""
        UPDATE {_TABLE} SET execute_after = NOW()
        WHERE entrypoint IN ('{TASK}', '{SUSPECT}') AND status = 'queued'
        AND execute_after > NOW() + $1
        """,
        timedelta(seconds=longest_wait),
    )
    await session.execute(
        f"UPDATE {_TABLE} SET heartbeat = NOW() WHERE status = 'picked' AND heartbeat > NOW()"
    )


async def prune(session: Session, *, larger_than: int) -> None:
    """Empty PGQueuer's log once it takes more than so many bytes; nobody else does."""
    log = NAMES.qualified.queue_table_log
    if await session.fetchval(f"SELECT pg_total_relation_size('{log}')") > larger_than:
        await queries_on(session).clear_queue_log()
