"""The statements that the PostgreSQL engine shares between its methods, each on a given session."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from operator import attrgetter
from typing import Any

from afterward.engines.postgres.schema import Session
from afterward.errors import KeyTaken, RecordNotFound, TaskNotFound
from afterward.retry import MAX_CRASHES
from afterward.task import (
    ANSWERS_LIVE_SECONDS,
    FINISHED,
    Answer,
    Outcome,
    Record,
    Status,
    Task,
    Writes,
    to_json,
)

INSERT_AT_ONCE = 1000  # tasks in one statement
TASKS_CHANNEL = "afterward_tasks"  # notified whenever a task may have become ready

Row = Mapping[str, Any]

_COLUMNS = tuple(field.name for field in fields(Task))
TASK = ", ".join(f"tasks.{column}" for column in _COLUMNS)
_NEW = (
    *("id", "kind", "arguments", "request_id", "client", "status", "max_attempts", "gives_up_at"),
    *("created_at", "updated_at", "due_at"),
)
RECORD = "collection, client, id, body, created_at"
ANSWER = "key, fingerprint, body, location, created_at"

# A waiting task is `timed` if it was to wait when it was written: until a retry is due, for
# example. Any other waiting task is due, whatever the clock says now.
CLAIM = f"""
    WITH suspects AS (
        SELECT seq FROM afterward.tasks
        WHERE status IN ('queued', 'retrying') AND crashes > 0 AND kind = ANY($2)
        AND (NOT timed OR ready_at <= now())
        ORDER BY ready_at, seq LIMIT least($3::int, $4::int)
        FOR UPDATE SKIP LOCKED
    ), ranges AS (
        SELECT kind, timed, until FROM unnest($2::text[]) AS kind,
            (VALUES (false, 'infinity'::timestamptz), (true, now())) AS ranges (timed, until)
    ), shares AS (
        -- Count how many tasks of each range belong to the tasks that have waited longest. So no
        -- more rows are locked below than are claimed: with a limit of 10, for example, 7 of one
        -- kind and 3 of another.
        SELECT kind, timed, until, count(*) AS tasks FROM (
            SELECT ranges.* FROM ranges, LATERAL (
                SELECT ready_at, seq FROM afterward.tasks
                WHERE status IN ('queued', 'retrying') AND crashes = 0
                AND tasks.kind = ranges.kind AND tasks.timed = ranges.timed
                AND ready_at <= ranges.until
                ORDER BY ready_at, seq LIMIT $3
            ) AS due
            ORDER BY ready_at, seq LIMIT $3
        ) AS oldest GROUP BY kind, timed, until
    ), others AS (
        SELECT due.seq FROM shares, LATERAL (
            SELECT seq FROM afterward.tasks
            WHERE status IN ('queued', 'retrying') AND crashes = 0
            AND tasks.kind = shares.kind AND tasks.timed = shares.timed
            AND ready_at <= shares.until
            ORDER BY ready_at, seq LIMIT shares.tasks
            FOR UPDATE SKIP LOCKED
        ) AS due
    ), chosen AS (
        SELECT seq FROM suspects UNION ALL SELECT seq FROM others LIMIT $3
    ), claimed AS (
        UPDATE afterward.tasks
        SET status = 'running', attempts = attempts + 1, claims = claims + 1,
            owner = $1, lease_until = now() + $5,
            started_at = coalesce(started_at, $6), updated_at = $6
        FROM chosen WHERE tasks.seq = chosen.seq
        RETURNING {TASK}, tasks.seq
    ), dead AS (
        SELECT seq, crashes + 1 >= {MAX_CRASHES} OR coalesce(attempts >= max_attempts, false)
            AS failed
        FROM afterward.tasks
        WHERE status = 'running' AND lease_until <= now() - $7::interval
        AND (owner <> $1 OR (id, claims) NOT IN (SELECT * FROM unnest($8::text[], $9::int[])))
        ORDER BY lease_until FOR UPDATE SKIP LOCKED
    ), requeued AS (
        UPDATE afterward.tasks
        SET crashes = crashes + 1, owner = NULL, lease_until = NULL, error = $10,
            updated_at = $6, due_at = $6, ready_at = now(),
            status = CASE WHEN failed THEN 'failed' ELSE 'retrying' END,
            finished_at = CASE WHEN failed THEN $6::float8 END
        FROM dead WHERE tasks.seq = dead.seq
        RETURNING {TASK}, tasks.seq
    )
    SELECT * FROM claimed UNION ALL SELECT * FROM requeued
"""

# The kinds of the waiting tasks. The index is asked for the first kind, then for the next one after
# that, and so on: one look-up for each kind, however many tasks wait.
_WAITING_KINDS = """
    kinds AS (
        (SELECT kind FROM afterward.tasks
         WHERE status IN ('queued', 'retrying') AND crashes = 0 ORDER BY kind LIMIT 1)
        UNION ALL
        SELECT (SELECT tasks.kind FROM afterward.tasks
                WHERE status IN ('queued', 'retrying') AND crashes = 0 AND tasks.kind > kinds.kind
                ORDER BY tasks.kind LIMIT 1)
        FROM kinds WHERE kinds.kind IS NOT NULL
    )
"""

OLDEST = f"""
    WITH RECURSIVE {_WAITING_KINDS}
    SELECT least(
        (SELECT min(due_at) FROM kinds, (VALUES (false), (true)) AS ranges (timed), LATERAL (
            SELECT due_at FROM afterward.tasks
            WHERE status IN ('queued', 'retrying') AND crashes = 0
            AND tasks.kind = kinds.kind AND tasks.timed = ranges.timed
            ORDER BY ready_at, seq LIMIT 1
        ) AS oldest),
        (SELECT due_at FROM afterward.tasks
         WHERE status IN ('queued', 'retrying') AND crashes > 0
         ORDER BY ready_at, seq LIMIT 1)
    )
"""

# Only retries are pulled forward: a queued task that is timed has been given that time on purpose.
PULL_FORWARD = f"""
    WITH RECURSIVE {_WAITING_KINDS}, far AS (
        SELECT far.seq FROM kinds, LATERAL (
            SELECT seq FROM afterward.tasks
            WHERE status IN ('queued', 'retrying') AND crashes = 0 AND status = 'retrying'
            AND tasks.kind = kinds.kind AND timed AND ready_at > now() + $2
            FOR UPDATE SKIP LOCKED
        ) AS far
    )
    UPDATE afterward.tasks SET due_at = least(due_at, $1), ready_at = now()
    FROM far WHERE tasks.seq = far.seq
"""


@dataclass(frozen=True, slots=True)
class Settlement:
    """How an attempt at a task ended, and when."""

    task: Task
    outcome: Outcome
    now: float

    @property
    def attempt(self) -> tuple[str, int]:
        """The attempt: the task's id and the number of the claim."""
        return self.task.id, self.task.claims


def fits_in_one(several: Sequence[Writes]) -> bool:
    """Whether a single statement writes all of it, so that it needs no transaction around it."""
    tasks = sum(len(writes.tasks) for writes in several)
    more = any(w.records or w.removed or w.answer for w in several)
    return tasks <= INSERT_AT_ONCE and not more


async def insert(session: Session, several: Sequence[Writes]) -> None:
    """Insert the tasks and the records of several writes, remove others, and wake the workers."""
    tasks = [(task, writes.batch_id) for writes in several for task in writes.tasks]
    columns = ", ".join(_NEW)
    for start in range(0, len(tasks), INSERT_AT_ONCE):
        some, batch_ids = zip(*tasks[start : start + INSERT_AT_ONCE], strict=True)
        await session.execute(
            f"""
            WITH woken AS (SELECT pg_notify('{TASKS_CHANNEL}', ''))
            INSERT INTO afterward.tasks (batch_id, {columns}, ready_at)
            -- Relative to now, so that it does not matter whose clock is right.
            SELECT new.*, now() + (due_at - updated_at) * interval '1 second'
            FROM woken, unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::text[],
                $6::text[], $7::text[], $8::int[], $9::float8[], $10::float8[], $11::float8[],
                $12::float8[])
            AS new (batch_id, {columns})
            """,
            batch_ids,
            *zip(*map(attrgetter(*_NEW), some), strict=True),
        )
    if removed := {names(record) for writes in several for record in writes.removed}:
        await session.execute(
            """
            DELETE FROM afterward.records
            USING unnest($1::text[], $2::text[], $3::text[]) AS removed (collection, client, id)
            WHERE records.collection = removed.collection AND records.client = removed.client
            AND records.id = removed.id
            """,
            *zip(*sorted(removed), strict=True),
        )
    # Of two that are written over each other the later counts; in order, so that two processes
    # cannot wait for each other.
    records = {names(record): record for writes in several for record in writes.records}
    if records:
        await session.execute(
            """
            INSERT INTO afterward.records (collection, client, id, body, created_at)
            SELECT * FROM unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::float8[])
            ON CONFLICT (collection, client, id) DO UPDATE SET body = excluded.body
            """,
            *zip(
                *(
                    (*named, to_json(record.body), record.created_at)
                    for named, record in sorted(records.items())
                ),
                strict=True,
            ),
        )


async def lock_removed(session: Session, several: Sequence[Writes]) -> list[RecordNotFound | None]:
    """Lock the records that are to be removed; gives RecordNotFound for writes that lack one.

    Of two writes that remove the same record, the second lacks it.
    """
    removed = sorted({names(record) for writes in several for record in writes.removed})
    if not removed:
        return [None] * len(several)
    rows = await session.fetch(
        """
        SELECT collection, client, id FROM afterward.records
        JOIN unnest($1::text[], $2::text[], $3::text[]) AS removed (collection, client, id)
        USING (collection, client, id)
        ORDER BY collection, client, id FOR UPDATE OF records
        """,
        *zip(*removed, strict=True),
    )
    there = {(row["collection"], row["client"], row["id"]) for row in rows}

    def take(writes: Writes) -> RecordNotFound | None:
        wanted = {names(record) for record in writes.removed}
        if not wanted <= there:
            return RecordNotFound()
        there.difference_update(wanted)
        return None

    return [take(writes) for writes in several]


def names(record: Record) -> tuple[str, str, str]:
    """Give the primary key of a record."""
    return record.collection, record.client, record.id


async def keep_answers(session: Session, answers: Sequence[Answer | None]) -> list[KeyTaken | None]:
    """Keep the answers whose keys are free; gives what is in the way of each other one."""
    first = {answer.key: answer for answer in reversed(answers) if answer is not None}
    kept: set[str] = set()
    earlier: dict[str, Answer] = {}
    if first:
        rows = await session.fetch(
            f"""
            INSERT INTO afterward.answers ({ANSWER})
            SELECT * FROM unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::float8[])
            ON CONFLICT (key) DO UPDATE
            SET fingerprint = excluded.fingerprint, body = excluded.body,
                location = excluded.location, created_at = excluded.created_at
            WHERE answers.created_at < excluded.created_at - {ANSWERS_LIVE_SECONDS}
            RETURNING key
            """,
            *zip(*(tuple(asdict(first[key]).values()) for key in sorted(first)), strict=True),
        )
        kept = {row["key"] for row in rows}
    if taken := first.keys() - kept:
        rows = await session.fetch(
            f"SELECT {ANSWER} FROM afterward.answers WHERE key = ANY($1)", list(taken)
        )
        earlier = {row["key"]: Answer(**row) for row in rows}

    def in_the_way(answer: Answer | None) -> KeyTaken | None:
        if answer is None or (answer.key in kept and first[answer.key] is answer):
            return None
        return KeyTaken(earlier.get(answer.key, first[answer.key]))

    return [in_the_way(answer) for answer in answers]


async def end_attempts(
    session: Session, settlements: Sequence[Settlement]
) -> dict[tuple[str, int], Task]:
    """Write the outcomes of the attempts that still hold their tasks.

    Gives these tasks, each by its id and claims.
    """
    outcomes = [settlement.outcome for settlement in settlements]
    rows = await session.fetch(
        f"""
        WITH outcome AS (
            SELECT * FROM unnest($1::text[], $2::int[], $3::text[], $4::float8[], $5::float8[],
                                 $6::float8[], $7::text[], $8::text[], $9::bool[], $10::bool[])
            AS outcome (id, claims, status, now, due_at, finished_at, result, error, counts,
                        unexpected)
        ), held AS (
            SELECT seq, outcome.* FROM afterward.tasks JOIN outcome ON tasks.id = outcome.id
            WHERE tasks.owner IS NOT NULL
            -- An expression, so that the planner looks the ids up and sorts the few rows. It would
            -- go through all tasks in the order of an index otherwise.
            ORDER BY seq + 0 FOR UPDATE OF tasks
        )
        UPDATE afterward.tasks
        SET status = held.status, updated_at = held.now, result = held.result, error = held.error,
            finished_at = held.finished_at, owner = NULL, lease_until = NULL,
            due_at = coalesce(held.due_at, tasks.due_at),
            ready_at = now() + greatest(0, coalesce(held.due_at, held.now) - held.now)
                * interval '1 second',
            attempts = attempts - (NOT held.counts)::int,
            errors = errors + held.unexpected::int,
            crashes = CASE WHEN held.counts THEN 0 ELSE crashes END
        FROM held WHERE tasks.seq = held.seq AND tasks.claims = held.claims
        RETURNING {TASK}
        """,
        [settlement.task.id for settlement in settlements],
        [settlement.task.claims for settlement in settlements],
        [outcome.status for outcome in outcomes],
        [settlement.now for settlement in settlements],
        [outcome.due_at for outcome in outcomes],
        [s.now if s.outcome.status in FINISHED else None for s in settlements],
        [outcome.result for outcome in outcomes],
        [outcome.error for outcome in outcomes],
        [outcome.counts for outcome in outcomes],
        [outcome.unexpected for outcome in outcomes],
    )
    return {(row["id"], row["claims"]): to_task(row) for row in rows}


async def settled_before(
    session: Session, settlements: Sequence[Settlement]
) -> dict[tuple[str, int], Task]:
    """Read the tasks that an earlier try of the same settlements has settled.

    The answer to that try was lost. Gives the tasks, each by its id and claims.
    """
    rows = await session.fetch(
        f"""
        SELECT {TASK} FROM afterward.tasks
        JOIN unnest($1::text[], $2::int[], $3::text[], $4::float8[])
            AS settled (id, claims, status, now) USING (id, claims, status)
        WHERE tasks.updated_at = settled.now
        """,
        [settlement.task.id for settlement in settlements],
        [settlement.task.claims for settlement in settlements],
        [settlement.outcome.status for settlement in settlements],
        [settlement.now for settlement in settlements],
    )
    return {(row["id"], row["claims"]): to_task(row) for row in rows}


async def read_task(session: Session, task_id: str) -> Task:
    """Read a task; raises TaskNotFound."""
    row = await session.fetchrow(f"SELECT {TASK} FROM afterward.tasks WHERE id = $1", task_id)
    if row is None:
        raise TaskNotFound
    return to_task(row)


def to_task(row: Row) -> Task:
    """Make a Task of a row that has the columns of TASK."""
    values = {column: row[column] for column in _COLUMNS}
    return Task(**values | {"status": Status(values["status"])})


def to_record(row: Row) -> Record:
    """Make a Record of a row that has the columns of RECORD."""
    return Record(**{**row, "body": json.loads(row["body"])})


def affected(done: str) -> int:
    """How many rows a statement changed; its answer is "DELETE 3", for example."""
    return int(done.rpartition(" ")[2])
