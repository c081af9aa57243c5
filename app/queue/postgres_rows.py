"""What the PostgreSQL engine writes into the tables, several tasks at a time."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from app.queue import postgres_entries as entries
from app.queue.errors import KeyTaken, TaskNotFound
from app.queue.postgres_entries import Session
from app.queue.retry import MAX_CRASHES, WORKER_DIED
from app.queue.task import (
    ANSWERS_LIVE_SECONDS,
    FINISHED,
    WAITING,
    Answer,
    Batch,
    Outcome,
    Status,
    Task,
    to_json,
)

_COLUMNS = tuple(field.name for field in fields(Task))
TASK = ", ".join(f"tasks.{column}" for column in _COLUMNS)
_ANSWER = "key, fingerprint, body, location, created_at"

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Settlement:
    """How an attempt ended, and when."""

    task: Task
    outcome: Outcome
    now: float


async def write_batches(session: Session, batches: Sequence[Batch]) -> None:
    """Insert the tasks, with their entries, and the records of several batches."""
    if tasks := [task for batch in batches for task in batch.tasks]:
        numbers = await entries.enter(session, tasks)
        await session.execute(
            """
            INSERT INTO afterward.tasks (entry, id, kind, arguments, request_id, client, status,
                                         max_attempts, created_at, updated_at, due_at)
            SELECT * FROM unnest($1::bigint[], $2::text[], $3::text[], $4::text[], $5::text[],
                                 $6::text[], $7::text[], $8::int[], $9::float8[], $10::float8[],
                                 $11::float8[])
            """,
            numbers,
            [task.id for task in tasks],
            [task.kind for task in tasks],
            [task.arguments for task in tasks],
            [task.request_id for task in tasks],
            [task.client for task in tasks],
            [task.status for task in tasks],
            [task.max_attempts for task in tasks],
            [task.created_at for task in tasks],
            [task.updated_at for task in tasks],
            [task.due_at for task in tasks],
        )
    # Of two that are written over each other the later counts; in order, so that two processes
    # cannot wait for each other.
    records = {(r.collection, r.client, r.id): r for batch in batches for r in batch.records}
    if records:
        await session.execute(
            """
            INSERT INTO afterward.records (collection, client, id, body, created_at)
            SELECT * FROM unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::float8[])
            ON CONFLICT (collection, client, id) DO UPDATE SET body = excluded.body
            """,
            *zip(
                *(
                    (*names, to_json(record.body), record.created_at)
                    for names, record in sorted(records.items())
                ),
                strict=True,
            ),
        )


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
    session: Session, taken: Sequence[tuple[int, str]], owner: str, now: float
) -> list[tuple[int, Task]]:
    """Begin an attempt of each task whose entry was taken and that waits; gives them by entry."""
    rows = await session.fetch(
        f"""
        UPDATE afterward.tasks
        SET status = 'running', attempts = attempts + 1, claims = claims + 1, owner = $3,
            started_at = coalesce(started_at, $4), updated_at = $4
        FROM unnest($1::bigint[], $2::text[]) AS taken (entry, id)
        WHERE tasks.id = taken.id AND tasks.entry = taken.entry
        -- It waits, in other words; those who wait have an index, which must not be used here.
        AND tasks.status NOT IN ('running', 'succeeded', 'failed', 'cancelled')
        RETURNING tasks.entry, {TASK}
        """,
        [entry for entry, _ in taken],
        [task_id for _, task_id in taken],
        owner,
        now,
    )
    return [(row["entry"], as_task(row)) for row in rows]


async def take_back(session: Session, rows: Sequence[Row], now: float) -> list[Task]:
    """End the attempts of workers that died, and let those tasks wait again that still may."""
    taken = await session.fetch(
        f"""
        UPDATE afterward.tasks
        SET crashes = crashes + 1, owner = NULL, error = $3, updated_at = $2, due_at = $2,
            status = CASE WHEN crashes + 1 >= {MAX_CRASHES} OR attempts >= max_attempts
                     THEN 'failed' ELSE 'retrying' END,
            finished_at = CASE WHEN crashes + 1 >= {MAX_CRASHES} OR attempts >= max_attempts
                          THEN $2::float8 END
        WHERE id = ANY($1) AND status = 'running'
        RETURNING entry, {TASK}
        """,
        [row["id"] for row in rows],
        now,
        WORKER_DIED,
    )
    tasks = [as_task(row) for row in taken]
    await entries.remove(session, [(row["entry"], Status(row["status"])) for row in taken])
    await enter_again(session, [task for task in tasks if task.status in WAITING])
    return tasks


async def enter_again(session: Session, tasks: Sequence[Task]) -> None:
    """Make an entry for the next attempt of tasks that were there before."""
    await session.execute(
        """
        UPDATE afterward.tasks SET entry = new.entry
        FROM unnest($1::text[], $2::bigint[]) AS new (id, entry) WHERE tasks.id = new.id
        """,
        [task.id for task in tasks],
        await entries.enter(session, tasks),
    )


async def end_attempts(
    session: Session, settlements: Sequence[Settlement]
) -> dict[str, tuple[int, Task]]:
    """Write the outcomes of those attempts that still hold their tasks.

    Gives the tasks, each with the entry that this attempt was, by their ids.
    """
    outcomes = [settlement.outcome for settlement in settlements]
    rows = await session.fetch(
        f"""
        WITH outcome AS (
            SELECT * FROM unnest($1::text[], $2::int[], $3::text[], $4::float8[], $5::float8[],
                                 $6::float8[], $7::text[], $8::text[], $9::int[])
            AS outcome (id, claims, status, now, due_at, finished_at, result, error, not_counted)
        ), locked AS MATERIALIZED (
            SELECT id FROM {entries.NAMES.qualified.queue_table}
            WHERE id = ANY(ARRAY(SELECT entry FROM afterward.tasks WHERE id = ANY($1)))
            ORDER BY id FOR UPDATE
        )
        UPDATE afterward.tasks
        SET status = outcome.status, updated_at = outcome.now, finished_at = outcome.finished_at,
            due_at = coalesce(outcome.due_at, tasks.due_at), result = outcome.result,
            error = outcome.error, attempts = attempts - outcome.not_counted, owner = NULL
        FROM outcome
        WHERE tasks.id = outcome.id AND tasks.claims = outcome.claims
        AND tasks.status = 'running' AND tasks.entry = ANY(ARRAY(SELECT id FROM locked))
        RETURNING tasks.entry, {TASK}
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
    )
    return {row["id"]: (row["entry"], as_task(row)) for row in rows}


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
