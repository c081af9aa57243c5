"""The SQL statements of the SQLite engine. Each function runs in the transaction of its caller."""

import sqlite3
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import cache
from itertools import chain
from operator import attrgetter
from typing import Any

from afterward.engines.sqlite.group_commit import Row, in_chunks
from afterward.errors import KeyTaken, RecordNotFound, TaskNotFound
from afterward.history import error_group, with_failure
from afterward.retry import MAX_CRASHES, WORKER_DIED
from afterward.task import (
    ANSWERS_LIVE_SECONDS,
    FINISHED,
    NEW_TASK_FIELDS,
    RECORD_FIELDS,
    TASK_FIELDS,
    WAITING,
    Answer,
    Outcome,
    Record,
    Status,
    Task,
    Writes,
    body_of_record,
    restore_task,
    to_json,
)

TASK_COLUMNS = ", ".join(TASK_FIELDS)
# For many tasks at once, without the texts that can be long: those of 100 tasks can take 100 MB.
SHORT_COLUMNS = TASK_COLUMNS.replace("arguments", "'' AS arguments").replace(
    "history", "NULL AS history"
)
RECORD_COLUMNS = ", ".join(RECORD_FIELDS)


def status_list(statuses: Iterable[Status]) -> str:
    """Return statuses as SQL: `('queued', 'retrying')`."""
    return "(" + ", ".join(f"'{status}'" for status in statuses) + ")"


_WAITS = f"status IN {status_list(WAITING)} AND crashes = 0"

# Many statements below name their index (INDEXED BY), because SQLite has no statistics about these
# tables and could choose a worse index.

# The kinds of the waiting tasks, found by a loose index scan: look up the first kind in the index,
# then the first kind after it, and so on. If 100,000 `make_thumbnail` and 3 `send_email` tasks
# wait, this takes 3 look-ups; the third one finds no further kind.
_WAITING_KINDS = f"""
    kinds (kind) AS (
        SELECT (SELECT min(kind) FROM tasks INDEXED BY tasks_due WHERE {_WAITS})
        UNION ALL
        SELECT (SELECT min(tasks.kind) FROM tasks INDEXED BY tasks_due
                WHERE {_WAITS} AND tasks.kind > kinds.kind)
        FROM kinds WHERE kinds.kind IS NOT NULL
    )
"""

# The earliest due time of all waiting tasks. Within a kind, the index tasks_due is sorted by
# (timed, due_at). So there are two candidates for each kind: the first entry with timed = 0, and
# the first entry with timed = 1. Suspects have an index of their own, and give one more candidate.
OLDEST = f"""
    WITH RECURSIVE {_WAITING_KINDS}
    SELECT min(due_at) FROM (
        SELECT (SELECT min(due_at) FROM tasks INDEXED BY tasks_due
                WHERE {_WAITS} AND tasks.kind = kinds.kind AND timed = ranges.timed) AS due_at
        FROM kinds, (SELECT 0 AS timed UNION ALL SELECT 1) AS ranges
        UNION ALL
        SELECT min(due_at) FROM tasks INDEXED BY tasks_suspect
        WHERE status IN {status_list(WAITING)} AND crashes > 0
    )
"""

# Make up to :limit retries of the :kinds due that have a due time after :latest. For example, at
# 12:00:00 a retry is planned for 12:00:30, and then the clock is set back to 11:00:00: the retry
# would wait for more than an hour. Queued tasks keep their due time, because it was chosen on
# purpose.
PULL_FORWARD = f"""
    UPDATE tasks SET due_at = :now WHERE seq IN (
        SELECT seq FROM json_each(:kinds) AS kinds CROSS JOIN tasks INDEXED BY tasks_due
        WHERE {_WAITS} AND status = 'retrying' AND tasks.kind = kinds.value AND timed = 1
        AND due_at > :latest
        LIMIT :limit
    )
"""


# Claims


@cache
def claim(kinds: int, urgent: int) -> str:
    """Return the statement that claims due tasks of :kind_0, :kind_1 and so on.

    The first `urgent` of these kinds are urgent.

    A waiting task is `timed` if its due time was in the future when it was written. Any other
    waiting task is due at once, whatever the clock says now. So the due tasks of each kind are two
    ranges of the index tasks_due (kind, timed, due_at, seq), and each range is sorted already:

        kind = 'send_email' AND timed = 0                       for example, new tasks
        kind = 'send_email' AND timed = 1 AND due_at <= :now    for example, retries

    SQLite merges the ranges in the order of due times and stops at the limit. With 3 slots, and
    mails due at 10, 12 and 14 s and thumbnails due at 11 and 13 s, the tasks of 10, 11 and 12 s are
    claimed, and a million waiting tasks of another kind cost no further step.
    """
    names = [f":kind_{n}" for n in range(kinds)]
    oldest = map(_oldest, filter(None, (names[:urgent], names[urgent:])))
    return f"""
        UPDATE tasks
        SET status = 'running', attempts = attempts + 1, claims = claims + 1,
            owner = :owner, lease_expires_at = :now + :lease,
            started_at = :now, updated_at = :now
        WHERE seq IN (
            -- 1. The oldest suspect, if the worker takes one: :suspect is 1 or 0.
            SELECT * FROM (
                SELECT seq FROM tasks INDEXED BY tasks_suspect
                WHERE status IN {status_list(WAITING)} AND crashes > 0
                AND kind IN ({", ".join(names)})
                AND (timed = 0 OR due_at <= :now)
                ORDER BY due_at, seq LIMIT :suspect
            )
            -- 2. The oldest of the other due tasks, and of the urgent ones before them.
            UNION ALL {" UNION ALL ".join(oldest)}
            LIMIT :limit  -- 3. With 3 slots: a suspect and two others, or three others.
        )
        RETURNING {TASK_COLUMNS}
        """


def _oldest(kinds: Iterable[str]) -> str:
    """Return the query for the oldest due tasks of these kinds: a merge of their ranges."""
    ranges = "UNION ALL".join(
        f"""
        SELECT due_at, seq FROM tasks INDEXED BY tasks_due
        WHERE {_WAITS} AND kind = {kind} AND {when}
        """
        for kind in kinds
        for when in ("timed = 0", "timed = 1 AND due_at <= :now")
    )
    return f"SELECT * FROM (SELECT seq FROM ({ranges} ORDER BY due_at, seq LIMIT :limit))"


def requeue_expired(connection: sqlite3.Connection, owner: str, now: float) -> list[Task]:
    """Re-queue running tasks of other owners whose leases have expired, and return these tasks.

    A task fails instead if it has crashed MAX_CRASHES times in a row, or if this was its last
    attempt.
    """
    rows = connection.execute(
        f"""
        UPDATE tasks INDEXED BY tasks_held
        SET crashes = crashes + 1, lease_expires_at = NULL, error = :crash,
            error_group = :crash_group, updated_at = :now, due_at = :now,
            status = iif(crashes + 1 >= :most OR attempts >= max_attempts, 'failed', 'retrying'),
            finished_at = iif(crashes + 1 >= :most OR attempts >= max_attempts, :now, NULL),
            -- Add an attempt to the JSON array, or to a new one: '[{...}' || ',' || '{...}' || ']'.
            -- The text is not parsed, because a claim must not fail for any history. It is unknown
            -- how long the attempt ran.
            history = coalesce(substr(history, 1, length(history) - 1) || ',', '[') || json_object(
                'attempt', attempts, 'started_at', started_at, 'seconds', NULL, 'worker', owner,
                'error', json(:crash)) || ']'
        WHERE status = 'running' AND lease_expires_at <= :now AND owner <> :owner
        RETURNING {TASK_COLUMNS}
        """,
        {
            "now": now,
            "most": MAX_CRASHES,
            "owner": owner,
            "crash": WORKER_DIED,
            "crash_group": error_group(WORKER_DIED),
        },
    ).fetchall()
    return [restore_task(row) for row in rows]


# Insertions and settlements: bulk operations, which GroupCommit merges


def insert_tasks(connection: sqlite3.Connection, tasks: Sequence[Task]) -> list[None]:
    """Insert tasks."""
    for chunk in in_chunks(tasks):
        values = chain.from_iterable(map(_new_values, chunk))
        connection.execute(_insertion(len(chunk)), tuple(values))
    return [None] * len(tasks)


@cache
def _insertion(tasks: int) -> str:
    row = f"({', '.join('?' * len(NEW_TASK_FIELDS))})"
    return f"INSERT INTO tasks ({', '.join(NEW_TASK_FIELDS)}) VALUES {', '.join([row] * tasks)}"


_new_values: Callable[[Task], Row] = attrgetter(*NEW_TASK_FIELDS)


def settle(
    connection: sqlite3.Connection, settlements: Sequence[tuple[Task, Outcome, float]]
) -> list[Task | None]:
    """Write how attempts ended. Each settlement is a claimed task, its outcome and the time.

    Returns each task after the change, or None if the worker had lost its claim.
    """
    settled: dict[tuple[str, int], Task] = {}
    for chunk in in_chunks(settlements):
        values = chain.from_iterable(map(_settlement_values, chunk))
        rows = connection.execute(_settlement(len(chunk)), tuple(values)).fetchall()
        settled |= {(task.id, task.claims): task for task in map(restore_task, rows)}
    return [settled.get((task.id, task.claims)) for task, _, _ in settlements]


@cache
def _settlement(settlements: int) -> str:
    row = f"({', '.join('?' * 12)})"
    columns = ", ".join(f"tasks.{column}" for column in TASK_FIELDS)
    return f"""
        WITH ended (id, claims, status, now, due_at, finished_at, result, error, error_group,
                    history, counts, unexpected)
        -- One row for each attempt. For example, the second claim succeeded at 1700000000 s:
        -- ('0197-4f2c', 2, 'succeeded', 1700000000, NULL, 1700000000, '"done"', NULL, NULL, NULL,
        --  1, 0)
        AS (VALUES {", ".join([row] * settlements)})
        UPDATE tasks
        SET status = ended.status, updated_at = ended.now, finished_at = ended.finished_at,
            due_at = coalesce(ended.due_at, tasks.due_at), result = ended.result,
            error = ended.error, error_group = ended.error_group,
            history = coalesce(ended.history, tasks.history),
            -- An attempt that does not count was given back: it is as if it had not begun.
            attempts = attempts - NOT ended.counts,
            errors = errors + ended.unexpected, crashes = iif(ended.counts, 0, crashes),
            lease_expires_at = NULL
        FROM ended
        -- The number of claims is the fencing token: it differs if the task was re-queued and
        -- claimed by another worker in the meantime.
        WHERE tasks.id = ended.id AND tasks.status = 'running' AND tasks.claims = ended.claims
        RETURNING {columns}
        """


def _settlement_values(settlement: tuple[Task, Outcome, float]) -> Row:
    task, outcome, now = settlement
    return (
        task.id,
        task.claims,
        outcome.status,
        now,
        outcome.due_at,
        now if outcome.status in FINISHED else None,
        outcome.result,
        outcome.error,
        error_group(outcome.error),
        with_failure(task, outcome.error, now) if outcome.is_failure else None,
        outcome.counts,
        outcome.unexpected,
    )


# Units of work


def put(connection: sqlite3.Connection, writes: Writes) -> None:
    """Write a unit of work.

    Raises KeyTaken, and RecordNotFound if a record that is to be removed does not exist.
    """
    if writes.answer is not None:
        check_key(connection, writes.answer)
    for record in writes.removed:
        found = connection.execute(
            "SELECT 1 FROM records WHERE collection = ? AND client = ? AND id = ?",
            (record.collection, record.client, record.id),
        )
        if found.fetchone() is None:
            raise RecordNotFound
    write(connection, writes)


def write(connection: sqlite3.Connection, writes: Writes) -> None:
    """Write a unit of work that may be written.

    Its idempotency key is not in use. A record that is to be removed may be missing.
    """
    if writes.answer is not None:
        _insert_answer(connection, writes.answer)
    if writes.tasks:
        insert_tasks(connection, writes.tasks)
    for record in writes.removed:
        delete_record(connection, record)
    for record in writes.records:
        connection.execute(
            """
            INSERT INTO records (collection, client, id, body, created_at) VALUES (?, ?, ?, ?, ?)
            ON CONFLICT (collection, client, id) DO UPDATE SET body = excluded.body
            """,
            (record.collection, record.client, record.id, to_json(record.body), record.created_at),
        )


def delete_record(connection: sqlite3.Connection, record: Record) -> bool:
    """Remove a record. Returns False if it does not exist."""
    deleted = connection.execute(
        "DELETE FROM records WHERE collection = ? AND client = ? AND id = ?",
        (record.collection, record.client, record.id),
    )
    return deleted.rowcount == 1


def _insert_answer(connection: sqlite3.Connection, answer: Answer) -> None:
    """Store the answer to an idempotent request."""
    # A key is free again after 24 hours, even if retention has not removed its answer yet.
    connection.execute(
        """
        INSERT OR REPLACE INTO answers (key, fingerprint, body, location, created_at)
        VALUES (:key, :fingerprint, :body, :location, :created_at)
        """,
        asdict(answer),
    )


def check_key(connection: sqlite3.Connection, answer: Answer) -> None:
    """Raise KeyTaken if the idempotency key of an answer is in use. Writes nothing."""
    row = connection.execute(
        """
        SELECT key, fingerprint, body, location, created_at FROM answers
        WHERE key = ? AND created_at >= ?
        """,
        (answer.key, answer.created_at - ANSWERS_LIVE_SECONDS),
    ).fetchone()
    if row is not None:
        raise KeyTaken(Answer(*row))


# Changes by hand: a WHERE follows. They are for one task, or for a slice of a bulk action.

CANCEL = "UPDATE tasks SET status = 'cancelled', updated_at = :now, finished_at = :now"
QUEUE_AGAIN = """
    UPDATE tasks
    SET status = 'queued', attempts = 0, max_attempts = :max_attempts, gives_up_at = :gives_up_at,
        errors = 0, crashes = 0, progress = NULL, result = NULL, error = NULL, error_group = NULL,
        started_at = NULL, finished_at = NULL, updated_at = :now, due_at = :now
"""


# Single tasks, and rows


def update_task(
    connection: sqlite3.Connection, update: str, values: Mapping[str, Any] | Row
) -> Task | None:
    """Run an UPDATE of at most one task. Returns the task after it, or None if no row matched."""
    return _first_task(connection.execute(f"{update} RETURNING {TASK_COLUMNS}", values))


def read_task(connection: sqlite3.Connection, task_id: str) -> Task:
    """Return a task. Raises TaskNotFound."""
    task = _first_task(
        connection.execute(f"SELECT {TASK_COLUMNS} FROM tasks WHERE id = ?", (task_id,))
    )
    if task is None:
        raise TaskNotFound
    return task


def _first_task(rows: Iterable[Row]) -> Task | None:
    for row in rows:
        return restore_task(row)
    return None


def find_record(connection: sqlite3.Connection, record: Record) -> Record | None:
    """Return the stored record with the key of this one, or None."""
    row = connection.execute(
        f"SELECT {RECORD_COLUMNS} FROM records WHERE collection = ? AND client = ? AND id = ?",
        (record.collection, record.client, record.id),
    ).fetchone()
    return None if row is None else to_record(row)


def to_record(row: Row) -> Record:
    """Make a Record from the columns of RECORD_COLUMNS."""
    collection, client, record_id, body, created_at = row
    return Record(collection, client, record_id, body_of_record(body), created_at)
