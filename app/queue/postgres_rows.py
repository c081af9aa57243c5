"""What the PostgreSQL engine writes into the tables, several tasks at a time."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from operator import attrgetter
from typing import Any

from app.queue import postgres_entries as entries
from app.queue.errors import KeyTaken, RecordNotFound, TaskNotFound
from app.queue.postgres_entries import Entrypoint, Session
from app.queue.retry import MAX_CRASHES, WORKER_DIED
from app.queue.task import (
    ANSWERS_LIVE_SECONDS,
    FINISHED,
    WAITING,
    Answer,
    Outcome,
    Record,
    Status,
    Task,
    Writes,
    to_json,
)

_COLUMNS = tuple(field.name for field in fields(Task))
TASK = ", ".join(f"tasks.{column}" for column in _COLUMNS)
# Of a task that is put; whatever else there is begins as the table says.
_NEW = (
    *("id", "kind", "arguments", "request_id", "client", "status", "max_attempts"),
    *("created_at", "updated_at", "due_at"),
)
_ANSWER = "key, fingerprint, body, location, created_at"

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Settlement:
    """How an attempt ended, and when."""

    task: Task
    outcome: Outcome
    now: float

    @property
    def brings_more(self) -> bool:
        """Whether there is more to write than how the attempt ended."""
        follow_ups = self.outcome.follow_ups
        return follow_ups != Writes() or self.outcome.status in WAITING


def fits_in_one(several: Sequence[Writes]) -> bool:
    """Whether a single statement writes all of it, so that it needs no transaction around it."""
    tasks = sum(len(writes.tasks) for writes in several)
    more = any(w.records or w.removed or w.answer for w in several)
    return tasks <= entries.AT_ONCE and not more


async def write_all(session: Session, several: Sequence[Writes]) -> None:
    """Insert the tasks, with their entries, and the records of several writes; remove others."""
    tasks = [(task, writes.batch_id) for writes in several for task in writes.tasks]
    columns = ", ".join(_NEW)
    for start in range(0, len(tasks), entries.AT_ONCE):
        some, batch_ids = zip(*tasks[start : start + entries.AT_ONCE], strict=True)
        await session.execute(
            f"""
            WITH new AS (
                SELECT {entries.NEXT} AS entry, 0 AS crashes, *
                FROM unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::text[], $6::text[],
                            $7::text[], $8::int[], $9::float8[], $10::float8[], $11::float8[])
                AS new (batch_id, {columns})
            ), {entries.ENTER}
            INSERT INTO afterward.tasks (entry, crashes, batch_id, {columns}) SELECT * FROM new
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
            INSERT INTO afterward.answers ({_ANSWER})
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
            f"SELECT {_ANSWER} FROM afterward.answers WHERE key = ANY($1)", list(taken)
        )
        earlier = {row["key"]: Answer(**row) for row in rows}

    def in_the_way(answer: Answer | None) -> KeyTaken | None:
        if answer is None or (answer.key in kept and first[answer.key] is answer):
            return None
        return KeyTaken(earlier.get(answer.key, first[answer.key]))

    return [in_the_way(answer) for answer in answers]


async def begin_attempts(
    session: Session,
    entrypoint: Entrypoint,
    owner: str,
    *,
    limit: int,
    silence: float,
    now: float,
) -> tuple[list[Task], list[int]]:
    """Claim up to `limit` entries, and begin an attempt of each task of theirs that waits.

    An entry is claimed if it is due, or if its owner was silent for `silence` seconds. Gives the
    tasks, and the strange entries: those whose task does not wait.
    """
    rows = await session.fetch(
        f"""
        {entries.TAKE}, begun AS (
            UPDATE afterward.tasks
            SET status = 'running', attempts = tasks.attempts + 1, claims = claims + 1,
                owner = $5, started_at = coalesce(started_at, $6), updated_at = $6
            FROM claimed
            -- The collation is that of the index; by itself, this function's would be another.
            WHERE tasks.id = convert_from(claimed.payload, 'UTF8') COLLATE "default"
            AND tasks.entry = claimed.id
            -- It waits, in other words; those who wait have an index, which must not be used here.
            AND tasks.status NOT IN ('running', 'succeeded', 'failed', 'cancelled')
            RETURNING tasks.entry, {TASK}
        )
        SELECT * FROM (
            SELECT ARRAY(SELECT id FROM claimed WHERE id NOT IN (SELECT entry FROM begun))
        ) AS others (strange) LEFT JOIN begun ON TRUE
        ORDER BY begun.due_at, begun.entry
        """,
        *entries.taking(entrypoint, owner, limit=limit, silence=silence),
        owner,
        now,
    )
    return [as_task(row) for row in rows if row["id"] is not None], rows[0]["strange"]


async def lock_running(session: Session, strange: Sequence[int]) -> Sequence[Row]:
    """Lock entries, and give the rows of those whose tasks are running."""
    return await session.fetch(
        f"""
        SELECT tasks.entry, tasks.id, tasks.owner, tasks.claims
        FROM {entries.NAMES.qualified.queue_table} AS held
        JOIN afterward.tasks
        ON tasks.id = convert_from(held.payload, 'UTF8') COLLATE "default"
        AND tasks.entry = held.id
        WHERE held.id = ANY($1) AND tasks.status = 'running'
        ORDER BY held.id FOR UPDATE OF held
        """,
        strange,
    )


async def take_back(session: Session, rows: Sequence[Row], now: float) -> list[Task]:
    """End the attempts of workers that died, and let those tasks wait again that still may."""
    rows = await session.fetch(
        f"""
        WITH ended AS (
            UPDATE afterward.tasks
            SET crashes = crashes + 1, owner = NULL, error = $3, updated_at = $2, due_at = $2,
                status = CASE WHEN crashes + 1 >= {MAX_CRASHES} OR attempts >= max_attempts
                         THEN 'failed' ELSE 'retrying' END,
                finished_at = CASE WHEN crashes + 1 >= {MAX_CRASHES} OR attempts >= max_attempts
                              THEN $2::float8 END
            WHERE id = ANY($1) AND status = 'running'
            RETURNING tasks.entry, '{entries.ENDS[Status.FAILED]}' AS ending, {TASK}
        ), {entries.REMOVE}
        SELECT * FROM ended
        """,
        [row["id"] for row in rows],
        now,
        WORKER_DIED,
    )
    tasks = [as_task(row) for row in rows]
    if again := [task for task in tasks if task.status in WAITING]:
        await enter_again(session, again)
    return tasks


async def enter_again(session: Session, tasks: Sequence[Task]) -> None:
    """Make an entry for the next attempt of tasks that this transaction lets wait again."""
    await session.execute(
        f"""
        WITH new AS (
            SELECT {entries.NEXT} AS entry, id, crashes, due_at, updated_at
            FROM afterward.tasks WHERE id = ANY($1)
        ), {entries.ENTER}
        UPDATE afterward.tasks SET entry = new.entry FROM new WHERE tasks.id = new.id
        """,
        [task.id for task in tasks],
    )


async def end_attempts(session: Session, settlements: Sequence[Settlement]) -> dict[str, Task]:
    """Write the outcomes of those attempts that still hold their tasks; gives these, by id.

    Their entries are removed.
    """
    outcomes = [settlement.outcome for settlement in settlements]
    rows = await session.fetch(
        f"""
        WITH outcome AS (
            SELECT * FROM unnest($1::text[], $2::int[], $3::text[], $4::float8[], $5::float8[],
                                 $6::float8[], $7::text[], $8::text[], $9::int[], $10::text[])
            AS outcome (id, claims, status, now, due_at, finished_at, result, error, not_counted,
                        ending)
        ), locked AS MATERIALIZED (
            SELECT id FROM {entries.NAMES.qualified.queue_table}
            WHERE id = ANY(ARRAY(SELECT entry FROM afterward.tasks WHERE id = ANY($1)))
            ORDER BY id FOR UPDATE
        ), ended AS (
            UPDATE afterward.tasks
            SET status = outcome.status, updated_at = outcome.now, result = outcome.result,
                error = outcome.error, finished_at = outcome.finished_at, owner = NULL,
                due_at = coalesce(outcome.due_at, tasks.due_at),
                attempts = attempts - outcome.not_counted
            FROM outcome
            WHERE tasks.id = outcome.id AND tasks.claims = outcome.claims
            AND tasks.entry = ANY(ARRAY(SELECT id FROM locked))
            -- It is running, in other words; those that run have an index, of no use here.
            AND tasks.owner IS NOT NULL
            RETURNING tasks.entry, outcome.ending, {TASK}
        ), {entries.REMOVE}
        SELECT * FROM ended
        """,
        [settlement.task.id for settlement in settlements],
        [settlement.task.claims for settlement in settlements],
        [outcome.status for outcome in outcomes],
        [settlement.now for settlement in settlements],
        [outcome.due_at for outcome in outcomes],
        [s.now if s.outcome.status in FINISHED else None for s in settlements],
        [outcome.result for outcome in outcomes],
        [outcome.error for outcome in outcomes],
        [0 if outcome.counts else 1 for outcome in outcomes],
        [entries.ENDS[outcome.status] for outcome in outcomes],
    )
    return {row["id"]: as_task(row) for row in rows}


async def settled_before(session: Session, settlements: Sequence[Settlement]) -> dict[str, Task]:
    """Tasks that an earlier try of the same settlements has settled, whose answer got lost."""
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
    return {row["id"]: as_task(row) for row in rows}


async def read_task(session: Session, task_id: str) -> Task:
    """The task, or TaskNotFound."""
    row = await session.fetchrow(f"SELECT {TASK} FROM afterward.tasks WHERE id = $1", task_id)
    if row is None:
        raise TaskNotFound
    return as_task(row)


def as_task(row: Row) -> Task:
    """The task of a row with the columns of TASK."""
    values = {column: row[column] for column in _COLUMNS}
    return Task(**values | {"status": Status(values["status"])})
