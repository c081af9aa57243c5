"""The SQL statements of the PostgreSQL engine. Each function runs in the session of its caller."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from operator import attrgetter
from typing import Any

from afterward.engines.postgres.connections import Session
from afterward.errors import KeyTaken, RecordNotFound, TaskNotFound
from afterward.history import error_group, with_failure
from afterward.retry import MAX_CRASHES, Bounds
from afterward.task import (
    ANSWERS_LIVE_SECONDS,
    FINISHED,
    NEW_TASK_FIELDS,
    RECORD_FIELDS,
    TASK_FIELDS,
    Answer,
    Outcome,
    Record,
    Task,
    Writes,
    body_of_record,
    restore_task,
    to_json,
)

INSERT_AT_ONCE = 1000  # tasks in one statement
TASKS_CHANNEL = "afterward_tasks"  # is notified when a task may have become ready

Row = Mapping[str, Any]

TASK_COLUMNS = ", ".join(f"tasks.{column}" for column in TASK_FIELDS)
# For many tasks at once, without the texts that can be long: those of 100 tasks can take 100 MB.
SHORT_COLUMNS = TASK_COLUMNS.replace("tasks.arguments", "'' AS arguments").replace(
    "tasks.history", "NULL AS history"
)
RECORD_COLUMNS = ", ".join(RECORD_FIELDS)
_ANSWER_COLUMNS = "key, fingerprint, body, location, created_at"

# Claim due tasks, and re-queue crashed tasks. Parameters:
#
#   $1  the owner                            $6  the time by the clock of the worker's process
#   $2  the kinds                            $7  the length of a recent outage
#   $3  the limit                            $8  the attempts that this process holds: task ids,
#   $4  1 to claim a suspect too, else 0     $9  and the numbers of their claims
#   $5  the length of the lease              $10 the error of a crashed attempt, $11 its group
#                                            $12 the urgent kinds
#
# A waiting task is `timed` if its due time was in the future when it was written, like that of a
# retry. Any other waiting task is due at once, whatever the clock says now. So the due tasks of
# each kind are two ranges of the index tasks_ready (kind, timed, ready_at, seq), and each range is
# sorted already. A million waiting tasks of another kind cost no further step.
CLAIM = f"""
    WITH suspects AS (
        -- 1. The oldest suspect, if the worker takes one. SKIP LOCKED leaves out rows that another
        --    worker is claiming at this moment, so workers do not wait for each other.
        SELECT seq FROM afterward.tasks
        WHERE status IN ('queued', 'retrying') AND crashes > 0 AND kind = ANY($2)
        AND (NOT timed OR ready_at <= now())
        ORDER BY ready_at, seq LIMIT least($3::int, $4::int)
        FOR UPDATE SKIP LOCKED
    ), ranges AS (
        -- 2. Two ranges of the index for each kind: ('send_email', false, 'infinity') has the tasks
        --    that are due at once, and ('send_email', true, now()) the timed ones that are due.
        SELECT kind, timed, until, kind = ANY($12::text[]) AS urgent
        FROM unnest($2::text[]) AS kind,
            (VALUES (false, 'infinity'::timestamptz), (true, now())) AS ranges (timed, until)
    ), shares AS (
        -- 3. Count how many of the oldest due tasks each range has, with urgent ones before others.
        --    With a limit of 10, these may be 7 of one range and 3 of another. This reads at most
        --    10 tasks of each range, and locks none, so that step 4 does not lock more rows than
        --    are claimed.
        SELECT kind, timed, until, count(*) AS tasks FROM (
            SELECT ranges.* FROM ranges, LATERAL (
                SELECT ready_at, seq FROM afterward.tasks
                WHERE status IN ('queued', 'retrying') AND crashes = 0
                AND tasks.kind = ranges.kind AND tasks.timed = ranges.timed
                AND ready_at <= ranges.until
                ORDER BY ready_at, seq LIMIT $3
            ) AS due
            ORDER BY urgent DESC, ready_at, seq LIMIT $3
        ) AS oldest GROUP BY kind, timed, until
    ), others AS (
        -- 4. Lock so many tasks of each range: the oldest that no other worker is claiming.
        SELECT due.seq FROM shares, LATERAL (
            SELECT seq FROM afterward.tasks
            WHERE status IN ('queued', 'retrying') AND crashes = 0
            AND tasks.kind = shares.kind AND tasks.timed = shares.timed
            AND ready_at <= shares.until
            ORDER BY ready_at, seq LIMIT shares.tasks
            FOR UPDATE SKIP LOCKED
        ) AS due
    ), chosen AS (
        -- 5. With a limit of 10: a suspect and nine others, or ten others.
        SELECT seq FROM suspects UNION ALL SELECT seq FROM others LIMIT $3
    ), claimed AS (
        UPDATE afterward.tasks
        SET status = 'running', attempts = attempts + 1, claims = claims + 1,
            owner = $1, lease_until = now() + $5,
            started_at = $6, updated_at = $6
        FROM chosen WHERE tasks.seq = chosen.seq
        RETURNING {TASK_COLUMNS}, tasks.seq
    ), crashed AS (
        -- 6. Find the crashed tasks: their leases, extended by the outage, have expired. Attempts
        --    that this process holds are not crashed; only its heartbeat is late.
        SELECT seq, crashes + 1 >= {MAX_CRASHES} OR coalesce(attempts >= max_attempts, false)
            AS failed
        FROM afterward.tasks
        WHERE status = 'running' AND lease_until <= now() - $7::interval
        AND (owner <> $1 OR (id, claims) NOT IN (SELECT * FROM unnest($8::text[], $9::int[])))
        ORDER BY lease_until FOR UPDATE SKIP LOCKED
    ), requeued AS (
        -- 7. Re-queue them, or let them fail if they have crashed too often.
        UPDATE afterward.tasks
        SET crashes = crashes + 1, lease_until = NULL, error = $10, error_group = $11,
            updated_at = $6, due_at = $6, ready_at = now(),
            -- Add an attempt to the JSON array, or to a new one: '[{...}' || ',' || '{...}' || ']'.
            -- The text is not parsed, because a claim must not fail for any history. It is unknown
            -- how long the attempt ran.
            history = coalesce(left(history, -1) || ',', '[') || json_build_object(
                'attempt', attempts, 'started_at', started_at, 'seconds', NULL, 'worker', owner,
                'error', $10::text::json) || ']',
            status = CASE WHEN failed THEN 'failed' ELSE 'retrying' END,
            finished_at = CASE WHEN failed THEN $6::float8 END
        FROM crashed WHERE tasks.seq = crashed.seq
        RETURNING {TASK_COLUMNS}, tasks.seq
    )
    SELECT * FROM claimed UNION ALL SELECT * FROM requeued
"""

# The kinds of the waiting tasks, found by a loose index scan: look up the first kind in the index,
# then the first kind after it, and so on. If 100,000 `make_thumbnail` and 3 `send_email` tasks
# wait, this takes 3 look-ups; the third one finds no further kind.
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

# The due time of the waiting task that has been ready for longest. Within a kind, the index
# tasks_ready is sorted by (timed, ready_at). So there are two candidates for each kind: the first
# entry that is not timed, and the first timed one. Suspects have an index of their own, and give
# one more candidate.
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

# Make up to $4 retries of the kinds $1 due that would have to wait for longer than $3. None is
# planned for so late a time: the clock of the database was set back. $2 is the time by the clock of
# the worker's process. Queued tasks keep their due time, because it was chosen on purpose.
PULL_FORWARD = """
    WITH far AS (
        SELECT far.seq FROM unnest($1::text[]) AS kind, LATERAL (
            SELECT seq FROM afterward.tasks
            WHERE status IN ('queued', 'retrying') AND crashes = 0 AND status = 'retrying'
            AND tasks.kind = kind.kind AND timed AND ready_at > now() + $3
            LIMIT $4 FOR UPDATE SKIP LOCKED
        ) AS far LIMIT $4
    )
    UPDATE afterward.tasks SET due_at = least(due_at, $2), ready_at = now()
    FROM far WHERE tasks.seq = far.seq
"""


@dataclass(frozen=True, slots=True)
class Settlement:
    """The end of an attempt: its outcome and time. `task` is the task as it was claimed."""

    task: Task
    outcome: Outcome
    now: float

    @property
    def attempt(self) -> tuple[str, int]:
        """The id of the task and the number of the claim: the key of an attempt."""
        return self.task.id, self.task.claims

    @property
    def history(self) -> str | None:
        """The history of the task, if this attempt adds to it."""
        if not self.outcome.is_failure:
            return None
        return with_failure(self.task, self.outcome.error, self.now)


def fits_in_one_statement(units: Sequence[Writes]) -> bool:
    """Tell whether one statement writes all these units of work, so that it needs no BEGIN."""
    tasks = sum(len(writes.tasks) for writes in units)
    more = any(w.records or w.removed or w.answer for w in units)
    return tasks <= INSERT_AT_ONCE and not more


async def write(session: Session, units: Sequence[Writes]) -> None:
    """Insert the tasks of several units of work, write and remove their records, wake workers."""
    tasks = [task for writes in units for task in writes.tasks]
    columns = ", ".join(NEW_TASK_FIELDS)
    for start in range(0, len(tasks), INSERT_AT_ONCE):
        chunk = tasks[start : start + INSERT_AT_ONCE]
        await session.execute(
            # PostgreSQL only runs a SELECT in WITH if the statement reads from it: FROM woken.
            f"""
            WITH woken AS (SELECT pg_notify('{TASKS_CHANNEL}', ''))
            INSERT INTO afterward.tasks ({columns}, ready_at)
            -- ready_at is by the clock of the database. If a process writes a task at 100 s by its
            -- own clock, which is due at 130 s, the task is ready in 30 s by any clock.
            SELECT new.*, now() + (due_at - updated_at) * interval '1 second'
            FROM woken, unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::text[],
                $6::text[], $7::text[], $8::text[], $9::text[], $10::int[], $11::float8[],
                $12::float8[], $13::float8[], $14::float8[])
            AS new ({columns})
            """,
            *zip(*map(attrgetter(*NEW_TASK_FIELDS), chunk), strict=True),
        )
    if removed := {record_key(record) for writes in units for record in writes.removed}:
        await session.execute(
            """
            DELETE FROM afterward.records
            USING unnest($1::text[], $2::text[], $3::text[]) AS removed (collection, client, id)
            WHERE records.collection = removed.collection AND records.client = removed.client
            AND records.id = removed.id
            """,
            *zip(*sorted(removed), strict=True),
        )
    # If two units write the same record, the later one counts: ON CONFLICT DO UPDATE may not meet a
    # row twice in one statement. Sorted keys give all processes the same order of row locks, so
    # that they cannot deadlock.
    records = {record_key(record): record for writes in units for record in writes.records}
    if records:
        await session.execute(
            """
            INSERT INTO afterward.records (collection, client, id, body, created_at)
            SELECT * FROM unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::float8[])
            ON CONFLICT (collection, client, id) DO UPDATE SET body = excluded.body
            """,
            *zip(
                *(
                    (*key, to_json(record.body), record.created_at)
                    for key, record in sorted(records.items())
                ),
                strict=True,
            ),
        )


async def lock_records_to_remove(
    session: Session, units: Sequence[Writes]
) -> list[RecordNotFound | None]:
    """Lock the records that units of work remove.

    Returns RecordNotFound for each unit that removes a record which does not exist, and None for
    the others. If two units remove the same record, it does not exist for the second one.
    """
    removed = sorted({record_key(record) for writes in units for record in writes.removed})
    if not removed:
        return [None] * len(units)
    rows = await session.fetch(
        """
        SELECT collection, client, id FROM afterward.records
        JOIN unnest($1::text[], $2::text[], $3::text[]) AS removed (collection, client, id)
        USING (collection, client, id)
        ORDER BY collection, client, id FOR UPDATE OF records
        """,
        *zip(*removed, strict=True),
    )
    existing = {(row["collection"], row["client"], row["id"]) for row in rows}

    def take_records(writes: Writes) -> RecordNotFound | None:
        wanted = {record_key(record) for record in writes.removed}
        if not wanted <= existing:
            return RecordNotFound()
        existing.difference_update(wanted)
        return None

    return [take_records(writes) for writes in units]


def record_key(record: Record) -> tuple[str, str, str]:
    """Return the primary key of a record."""
    return record.collection, record.client, record.id


async def insert_answers(
    session: Session, answers: Sequence[Answer | None]
) -> list[KeyTaken | None]:
    """Store the answers to idempotent requests, each if its key is free.

    Returns KeyTaken, with the earlier answer, for each answer with a key that is in use, and None
    for the others. Of two answers with the same key, the second one gets KeyTaken with the first.
    """
    # 1. Insert the first answer of each key, in the order of the keys, so that processes cannot
    #    deadlock. An answer from more than 24 hours ago is replaced.
    first = {answer.key: answer for answer in reversed(answers) if answer is not None}
    inserted: set[str] = set()
    if first:
        rows = await session.fetch(
            f"""
            INSERT INTO afterward.answers ({_ANSWER_COLUMNS})
            SELECT * FROM unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::float8[])
            ON CONFLICT (key) DO UPDATE
            SET fingerprint = excluded.fingerprint, body = excluded.body,
                location = excluded.location, created_at = excluded.created_at
            WHERE answers.created_at < excluded.created_at - {ANSWERS_LIVE_SECONDS}
            RETURNING key
            """,
            *zip(*(tuple(asdict(first[key]).values()) for key in sorted(first)), strict=True),
        )
        inserted = {row["key"] for row in rows}
    # 2. Read the stored answers of the keys that were not inserted.
    earlier = await _read_answers(session, first.keys() - inserted)

    def refusal(answer: Answer | None) -> KeyTaken | None:
        if answer is None or (answer.key in inserted and first[answer.key] is answer):
            return None
        return KeyTaken(earlier.get(answer.key, first[answer.key]))

    return [refusal(answer) for answer in answers]


async def find_taken_keys(
    session: Session, answers: Sequence[Answer | None]
) -> list[KeyTaken | None]:
    """Return KeyTaken for each answer with a key that is in use, and None for the others."""
    stored = await _read_answers(session, {answer.key for answer in answers if answer is not None})

    def is_taken(answer: Answer) -> bool:
        earlier = stored.get(answer.key)
        return earlier is not None and (
            earlier.created_at >= answer.created_at - ANSWERS_LIVE_SECONDS
        )

    return [
        KeyTaken(stored[answer.key]) if answer is not None and is_taken(answer) else None
        for answer in answers
    ]


async def _read_answers(session: Session, keys: Collection[str]) -> dict[str, Answer]:
    """Return the stored answers of these keys, by their keys."""
    if not keys:
        return {}
    rows = await session.fetch(
        f"SELECT {_ANSWER_COLUMNS} FROM afterward.answers WHERE key = ANY($1)", list(keys)
    )
    return {row["key"]: Answer(**row) for row in rows}


async def end_attempts(
    session: Session, settlements: Sequence[Settlement]
) -> dict[tuple[str, int], Task]:
    """Write the outcomes of attempts, but not of those that have lost their claims.

    Returns each task after the change, by its id and the number of the claim.
    """
    outcomes = [settlement.outcome for settlement in settlements]
    rows = await session.fetch(
        f"""
        WITH outcome AS (
            -- One row for each attempt. For example, the second claim succeeded at 1700000000 s:
            -- ('0197-4f2c', 2, 'succeeded', 1700000000, NULL, 1700000000, '"done"', NULL, NULL,
            --  NULL, true, false)
            SELECT * FROM unnest($1::text[], $2::int[], $3::text[], $4::float8[], $5::float8[],
                                 $6::float8[], $7::text[], $8::text[], $9::text[], $10::text[],
                                 $11::bool[], $12::bool[])
            AS outcome (id, claims, status, now, due_at, finished_at, result, error, error_group,
                        history, counts, unexpected)
        ), held AS (
            SELECT seq, outcome.* FROM afterward.tasks JOIN outcome ON tasks.id = outcome.id
            WHERE tasks.status = 'running'
            -- Row locks in the order of seq prevent deadlocks. The expression seq + 0 makes the
            -- planner look up the ids and sort the few rows. With seq alone it would go through all
            -- tasks in the order of the primary key.
            ORDER BY seq + 0 FOR UPDATE OF tasks
        )
        UPDATE afterward.tasks
        SET status = held.status, updated_at = held.now, result = held.result, error = held.error,
            error_group = held.error_group, history = coalesce(held.history, tasks.history),
            finished_at = held.finished_at, lease_until = NULL,
            due_at = coalesce(held.due_at, tasks.due_at),
            -- By the clock of the database: a retry that is due 8 s after held.now is ready in 8 s.
            ready_at = now() + greatest(0, coalesce(held.due_at, held.now) - held.now)
                * interval '1 second',
            -- An attempt that does not count was given back: it is as if it had not begun.
            attempts = attempts - (NOT held.counts)::int,
            errors = errors + held.unexpected::int,
            crashes = CASE WHEN held.counts THEN 0 ELSE crashes END
        -- The number of claims is the fencing token: it differs if the task was re-queued and
        -- claimed by another worker in the meantime.
        FROM held WHERE tasks.seq = held.seq AND tasks.claims = held.claims
        RETURNING {TASK_COLUMNS}
        """,
        [settlement.task.id for settlement in settlements],
        [settlement.task.claims for settlement in settlements],
        [outcome.status for outcome in outcomes],
        [settlement.now for settlement in settlements],
        [outcome.due_at for outcome in outcomes],
        [s.now if s.outcome.status in FINISHED else None for s in settlements],
        [outcome.result for outcome in outcomes],
        [outcome.error for outcome in outcomes],
        [error_group(outcome.error) for outcome in outcomes],
        [s.history for s in settlements],
        [outcome.counts for outcome in outcomes],
        [outcome.unexpected for outcome in outcomes],
    )
    return {(row["id"], row["claims"]): to_task(row) for row in rows}


async def read_already_settled(
    session: Session, settlements: Sequence[Settlement]
) -> dict[tuple[str, int], Task]:
    """Return the tasks that an earlier try of the same settlements has settled.

    The reply to that try was lost. So the caller repeats the settlements, with the same times.
    Returns each task by its id and the number of the claim.
    """
    rows = await session.fetch(
        f"""
        SELECT {TASK_COLUMNS} FROM afterward.tasks
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


async def cancel(
    session: Session, task_ids: Sequence[str], now: float, columns: str = TASK_COLUMNS
) -> Sequence[Row]:
    """Cancel the waiting ones of these tasks, and return their rows."""
    return await session.fetch(
        f"""
        UPDATE afterward.tasks SET status = 'cancelled', updated_at = $2, finished_at = $2
        WHERE id = ANY($1) AND status IN ('queued', 'retrying') RETURNING {columns}
        """,
        task_ids,
        now,
    )


async def queue_again(
    session: Session, bounds: Mapping[str, Bounds], now: float, columns: str = TASK_COLUMNS
) -> Sequence[Row]:
    """Queue the failed and the cancelled ones of these tasks again, and return their rows.

    `bounds` has the new bounds of each task, by its id.
    """
    return await session.fetch(
        f"""
        WITH woken AS (SELECT pg_notify('{TASKS_CHANNEL}', ''))
        UPDATE afterward.tasks
        SET status = 'queued', attempts = 0, max_attempts = given.max_attempts,
            gives_up_at = given.gives_up_at, errors = 0, crashes = 0, progress = NULL,
            result = NULL, error = NULL, error_group = NULL, started_at = NULL, finished_at = NULL,
            updated_at = $4, due_at = $4, ready_at = now()
        FROM woken, unnest($1::text[], $2::int[], $3::float8[])
            AS given (id, max_attempts, gives_up_at)
        WHERE tasks.id = given.id AND status IN ('failed', 'cancelled') RETURNING {columns}
        """,
        [*bounds],
        [each.max_attempts for each in bounds.values()],
        [each.gives_up_at for each in bounds.values()],
        now,
    )


async def read_task(session: Session, task_id: str) -> Task:
    """Return a task. Raises TaskNotFound."""
    row = await session.fetchrow(
        f"SELECT {TASK_COLUMNS} FROM afterward.tasks WHERE id = $1", task_id
    )
    if row is None:
        raise TaskNotFound
    return to_task(row)


def to_task(row: Row) -> Task:
    """Make a Task from a row with TASK_COLUMNS."""
    return restore_task(row[column] for column in TASK_FIELDS)


async def lock_record(session: Session, record: Record) -> Record:
    """Lock a record until the end of the transaction, and return it. A missing one is written."""
    row = await session.fetchrow(
        f"""
        INSERT INTO afterward.records (collection, client, id, body, created_at)
        VALUES ($1, $2, $3, $4, $5)
        ON CONFLICT (collection, client, id) DO UPDATE SET body = records.body
        RETURNING {RECORD_COLUMNS}
        """,
        *record_key(record),
        to_json(record.body),
        record.created_at,
    )
    assert row is not None
    return to_record(row)


def to_record(row: Row) -> Record:
    """Make a Record from a row with RECORD_COLUMNS."""
    return Record(**{**row, "body": body_of_record(row["body"])})


def row_count(command_tag: str) -> int:
    """Return the number of rows that a statement changed, from PostgreSQL's reply: "DELETE 3"."""
    return int(command_tag.rpartition(" ")[2])
