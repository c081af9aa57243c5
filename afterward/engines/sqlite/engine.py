"""The embedded engine: SQLite in WAL mode, for one process."""

import asyncio
import contextlib
import json
import os
import sqlite3
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, fields
from functools import cache
from itertools import chain
from operator import attrgetter
from pathlib import Path
from typing import Any, TypeVar

from afterward.engines.sqlite.database_file import SCHEMA_VERSION, lock, open_database
from afterward.engines.sqlite.group_commit import GroupCommit, Row, in_lots
from afterward.errors import (
    BatchNotFound,
    KeyTaken,
    RecordNotFound,
    TaskHasStarted,
    TaskNotFound,
    TaskNotGivenUp,
)
from afterward.events import Event, Subscriber
from afterward.retry import MAX_CRASHES, WORKER_DIED
from afterward.task import (
    ANSWERS_LIVE_SECONDS,
    FINISHED,
    WAITING,
    Answer,
    Backlog,
    Claim,
    Outcome,
    Record,
    Status,
    Task,
    Writes,
    to_json,
)

_COLUMNS = tuple(field.name for field in fields(Task))
_TASK = ", ".join(_COLUMNS)
_STATUSES = {status.value: status for status in Status}
_RECORD = "collection, client, id, body, created_at"
_REMOVE = "DELETE FROM records WHERE collection = ? AND client = ? AND id = ?"
_NEW = (
    "id",
    "kind",
    "arguments",
    "request_id",
    "client",
    "status",
    "max_attempts",
    "gives_up_at",
    "created_at",
    "updated_at",
    "due_at",
)


def _names(statuses: tuple[Status, ...]) -> str:
    return "(" + ", ".join(f"'{status}'" for status in statuses) + ")"


_WAITS = f"status IN {_names(WAITING)} AND crashes = 0"

# The kinds of the waiting tasks. The index is asked for the first kind, then for the next one after
# that, and so on: one look-up for each kind, however many tasks wait.
_WAITING_KINDS = f"""
    kinds (kind) AS (
        SELECT (SELECT min(kind) FROM tasks INDEXED BY tasks_due WHERE {_WAITS})
        UNION ALL
        SELECT (SELECT min(tasks.kind) FROM tasks INDEXED BY tasks_due
                WHERE {_WAITS} AND tasks.kind > kinds.kind)
        FROM kinds WHERE kinds.kind IS NOT NULL
    )
"""

_OLDEST = f"""
    WITH RECURSIVE {_WAITING_KINDS}
    SELECT min(due_at) FROM (
        SELECT (SELECT min(due_at) FROM tasks INDEXED BY tasks_due
                WHERE {_WAITS} AND tasks.kind = kinds.kind AND timed = ranges.timed) AS due_at
        FROM kinds, (SELECT 0 AS timed UNION ALL SELECT 1) AS ranges
        UNION ALL
        SELECT min(due_at) FROM tasks INDEXED BY tasks_suspect
        WHERE status IN {_names(WAITING)} AND crashes > 0
    )
"""

# Only retries are pulled forward: a queued task that is timed has been given that time on purpose.
_PULL_FORWARD = f"""
    WITH RECURSIVE {_WAITING_KINDS}
    UPDATE tasks SET due_at = :now WHERE seq IN (
        SELECT seq FROM kinds CROSS JOIN tasks INDEXED BY tasks_due
        WHERE {_WAITS} AND status = 'retrying' AND tasks.kind = kinds.kind AND timed = 1
        AND due_at > :latest
    )
"""

ResultT = TypeVar("ResultT")


class SQLite:
    """An Engine on one SQLite file. See Engine for what each method promises."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock: int
        self._commits = GroupCommit(lambda: open_database(path))
        self._arrived = asyncio.Event()

    async def start(self) -> None:
        self._lock = lock(self._path)
        try:
            await self._commits.start()
        except BaseException:
            os.close(self._lock)
            raise

    async def stop(self) -> None:
        # If the disk hangs, a commit may still be under way: then the lock is held until this
        # process has ended, so that no other one opens the file before.
        is_closed = await self._commits.stop()
        if is_closed:
            os.close(self._lock)

    async def put(self, writes: Writes) -> None:
        match writes:
            case Writes((task,), (), None, None, ()):  # the common case, which many requests share
                await self._commits.share(_insert, task)
            case _:
                await self._commits.run(lambda connection: _put(connection, writes))
        if writes.tasks:
            self._arrived.set()

    async def get(self, task_id: str) -> Task:
        return await self._commits.run(lambda connection: _get(connection, task_id))

    async def list_tasks(
        self,
        *,
        client: str,
        status: Status | None,
        kind: str | None,
        after: str | None,
        limit: int,
    ) -> list[Task]:
        # Only clients with a name have an index, which is used if this is said.
        named = "client = :client AND client <> ''" if client else "client = :client"
        # An index has all statuses but that of running tasks, which are few and have another one.
        is_running = status is Status.RUNNING
        of_status = (
            "status = 'running'" if is_running else "status = :status AND status <> 'running'"
        )
        filters = {named: client, of_status: status, "kind = :kind": kind, "id < :after": after}
        where = " AND ".join(sql for sql, value in filters.items() if value is not None)
        values = {"client": client, "status": status, "kind": kind, "after": after, "limit": limit}

        def page(connection: sqlite3.Connection) -> list[Task]:
            rows = connection.execute(
                f"""
                SELECT {_TASK} FROM tasks {"INDEXED BY tasks_held" if is_running else ""}
                WHERE {where} ORDER BY id DESC LIMIT :limit
                """,
                values,
            )
            return [_task(row) for row in rows]

        return await self._commits.run(page)

    async def count_batch(self, batch_id: str, *, client: str) -> dict[Status, int]:
        def count(connection: sqlite3.Connection) -> dict[Status, int]:
            rows = connection.execute(
                """
                SELECT status, sum(tasks) FROM (
                    SELECT status, 1 AS tasks FROM tasks
                    WHERE batch_id = :id AND client = :client
                    UNION ALL
                    SELECT status, tasks FROM removed WHERE batch_id = :id AND client = :client
                ) GROUP BY status
                """,
                {"id": batch_id, "client": client},
            )
            counts = {Status(status): tasks for status, tasks in rows}
            if not counts:
                raise BatchNotFound
            return dict.fromkeys(Status, 0) | counts

        return await self._commits.run(count)

    async def cancel(self, task_id: str, now: float) -> Task:
        return await self._change(
            f"""
            UPDATE tasks SET status = 'cancelled', updated_at = :now, finished_at = :now
            WHERE id = :id AND status IN {_names(WAITING)}
            """,
            {"id": task_id, "now": now},
            TaskHasStarted,
        )

    async def retry(
        self,
        task_id: str,
        now: float,
        writes: Writes,
        *,
        max_attempts: int | None,
        gives_up_at: float | None,
    ) -> Task:
        task = await self._change(
            """
            UPDATE tasks
            SET status = 'queued', attempts = 0, max_attempts = :max_attempts,
                gives_up_at = :gives_up_at, errors = 0, crashes = 0, progress = NULL,
                result = NULL, error = NULL, started_at = NULL, finished_at = NULL,
                updated_at = :now, due_at = :now
            WHERE id = :id AND status IN ('failed', 'cancelled')
            """,
            {
                "id": task_id,
                "now": now,
                "max_attempts": max_attempts,
                "gives_up_at": gives_up_at,
            },
            TaskNotGivenUp,
            writes,
        )
        self._arrived.set()
        return task

    async def _change(
        self,
        update: str,
        values: dict[str, Any],
        refusal: type[Exception],
        writes: Writes | None = None,
    ) -> Task:
        def change(connection: sqlite3.Connection) -> Task:
            if writes is not None:
                _write(connection, writes)
            task = _first(connection.execute(f"{update} RETURNING {_TASK}", values))
            if task is None:
                _get(connection, values["id"])  # raises TaskNotFound
                raise refusal
            return task

        return await self._commits.run(change)

    async def backlog(self) -> Backlog:
        def count(connection: sqlite3.Connection) -> Backlog:
            counts = dict(connection.execute("SELECT status, tasks FROM counts"))
            (oldest,) = connection.execute(_OLDEST).fetchone()
            return Backlog({Status(status): n for status, n in counts.items()}, oldest)

        return await self._commits.run(count)

    async def check(self) -> None:
        # It changes nothing, but is written and synced: a disk that only reads is no help.
        await self._commits.run(
            lambda connection: (
                connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}") and None
            )
        )

    async def claim(
        self,
        owner: str,
        *,
        kinds: Sequence[str],
        limit: int,
        suspect: bool = True,
        now: float,
        lease: float,
    ) -> Claim:
        names = {f"kind_{n}": kind for n, kind in enumerate(kinds)}
        values = {"owner": owner, "limit": limit, "suspect": suspect, "now": now, "lease": lease}

        def claim(connection: sqlite3.Connection) -> Claim:
            rows = (
                connection.execute(_claim(len(names)), values | names).fetchall() if names else ()
            )
            claimed = sorted(map(_task, rows), key=lambda task: task.due_at)
            return Claim(tuple(claimed), tuple(_requeue_expired(connection, owner, now)))

        return await self._commits.run(claim)

    async def extend(self, owner: str, *, now: float, lease: float) -> set[tuple[str, int]]:
        def extend(connection: sqlite3.Connection) -> set[tuple[str, int]]:
            rows = connection.execute(
                """
                UPDATE tasks SET lease_expires_at = :now + :lease
                WHERE status = 'running' AND owner = :owner
                RETURNING id, claims
                """,
                {"owner": owner, "now": now, "lease": lease},
            )
            return set(rows.fetchall())

        return await self._commits.run(extend)

    async def settle(self, task: Task, outcome: Outcome, now: float) -> Task | None:
        if outcome.follow_ups == Writes():
            return await self._commits.share(_settle, (task, outcome, now))

        def settle(connection: sqlite3.Connection) -> Task | None:
            (settled,) = _settle(connection, [(task, outcome, now)])
            if settled is not None:
                _write(connection, outcome.follow_ups)
            return settled

        settled = await self._commits.run(settle)
        self._arrived.set()
        return settled

    async def report(self, task: Task, progress: float, now: float) -> Task | None:
        return await self._commits.run(
            lambda connection: _first(
                connection.execute(
                    f"""
                    UPDATE tasks SET progress = ?, updated_at = ?
                    WHERE id = ? AND status = 'running' AND claims = ?
                    RETURNING {_TASK}
                    """,
                    (progress, now, task.id, task.claims),
                )
            )
        )

    async def pull_forward(self, *, now: float, longest_wait: float) -> None:
        def pull(connection: sqlite3.Connection) -> None:
            connection.execute(_PULL_FORWARD, {"now": now, "latest": now + longest_wait})

        await self._commits.run(pull)

    async def wait_for_tasks(self, at_most: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(at_most):
                await self._arrived.wait()
        self._arrived.clear()

    async def purge(self, *, finished_before: float, answered_before: float, limit: int) -> int:
        def purge(connection: sqlite3.Connection) -> int:
            tasks = connection.execute(
                """
                DELETE FROM tasks WHERE seq IN
                    (SELECT seq FROM tasks WHERE finished_at < ? ORDER BY finished_at LIMIT ?)
                """,
                (finished_before, limit),
            ).rowcount
            answers = connection.execute(
                """
                DELETE FROM answers WHERE key IN
                    (SELECT key FROM answers WHERE created_at < ? ORDER BY created_at LIMIT ?)
                """,
                (answered_before, limit),
            ).rowcount
            connection.execute(
                """
                DELETE FROM removed
                WHERE NOT EXISTS (SELECT 1 FROM tasks WHERE tasks.batch_id = removed.batch_id)
                """
            )
            return tasks + answers

        return await self._commits.run(purge)

    def publish(self, event: Event) -> None:
        """Tell nobody: there is no other process."""

    def subscribe(self, *subscribers: Subscriber) -> None:
        """Hear of nothing: there is no other process."""

    async def read_record(self, collection: str, record_id: str, *, client: str | None) -> Record:
        whose = "" if client is None else "AND client = :client"

        def read(connection: sqlite3.Connection) -> Record:
            row = connection.execute(
                f"""
                SELECT {_RECORD} FROM records
                WHERE collection = :collection {whose} AND id = :id
                """,
                {"collection": collection, "client": client, "id": record_id},
            ).fetchone()
            if row is None:
                raise RecordNotFound
            return _record(row)

        return await self._commits.run(read)

    async def list_records(
        self, collection: str, *, client: str, after: str | None, limit: int
    ) -> list[Record]:
        def page(connection: sqlite3.Connection) -> list[Record]:
            rows = connection.execute(
                f"""
                SELECT {_RECORD} FROM records
                WHERE collection = :collection AND client = :client
                AND (:after IS NULL OR id < :after)
                ORDER BY id DESC LIMIT :limit
                """,
                {"collection": collection, "client": client, "after": after, "limit": limit},
            )
            return [_record(row) for row in rows]

        return await self._commits.run(page)

    async def update_record(self, record: Record) -> bool:
        return await self._affects_one(
            "UPDATE records SET body = ? WHERE collection = ? AND client = ? AND id = ?",
            (to_json(record.body), record.collection, record.client, record.id),
        )

    async def delete_record(self, record: Record) -> bool:
        return await self._affects_one(_REMOVE, (record.collection, record.client, record.id))

    async def _affects_one(self, statement: str, values: tuple[str, ...]) -> bool:
        return await self._commits.run(
            lambda connection: connection.execute(statement, values).rowcount == 1
        )


def _insert(
    connection: sqlite3.Connection, tasks: Sequence[Task], batch_id: str | None = None
) -> list[None]:
    for some in in_lots(tasks):
        values = chain.from_iterable(map(_new, some))
        connection.execute(_insertion(len(some)), (batch_id, *values))
    return [None] * len(tasks)


@cache
def _insertion(tasks: int) -> str:
    row = f"(?1{', ?' * len(_NEW)})"  # the batch is one for all
    return f"INSERT INTO tasks (batch_id, {', '.join(_NEW)}) VALUES {', '.join([row] * tasks)}"


_new: Callable[[Task], Row] = attrgetter(*_NEW)


def _settle(
    connection: sqlite3.Connection, ended: Sequence[tuple[Task, Outcome, float]]
) -> list[Task | None]:
    settled: dict[tuple[str, int], Task] = {}
    for some in in_lots(ended):
        values = chain.from_iterable(map(_end, some))
        rows = connection.execute(_settlement(len(some)), tuple(values)).fetchall()
        settled |= {(task.id, task.claims): task for task in map(_task, rows)}
    return [settled.get((task.id, task.claims)) for task, _, _ in ended]


@cache
def _settlement(tasks: int) -> str:
    row = f"({', '.join('?' * 10)})"
    columns = ", ".join(f"tasks.{column}" for column in _COLUMNS)
    return f"""
        WITH ended (id, claims, status, now, due_at, finished_at, result, error, counts, unexpected)
        AS (VALUES {", ".join([row] * tasks)})
        UPDATE tasks
        SET status = ended.status, updated_at = ended.now, finished_at = ended.finished_at,
            due_at = coalesce(ended.due_at, tasks.due_at), result = ended.result,
            error = ended.error, attempts = attempts - NOT ended.counts,
            errors = errors + ended.unexpected, crashes = iif(ended.counts, 0, crashes),
            owner = NULL, lease_expires_at = NULL
        FROM ended
        WHERE tasks.id = ended.id AND tasks.status = 'running' AND tasks.claims = ended.claims
        RETURNING {columns}
        """


def _end(ended: tuple[Task, Outcome, float]) -> Row:
    task, outcome, now = ended
    return (
        task.id,
        task.claims,
        outcome.status,
        now,
        outcome.due_at,
        now if outcome.status in FINISHED else None,
        outcome.result,
        outcome.error,
        outcome.counts,
        outcome.unexpected,
    )


def _put(connection: sqlite3.Connection, writes: Writes) -> None:
    for record in writes.removed:
        found = connection.execute(
            "SELECT 1 FROM records WHERE collection = ? AND client = ? AND id = ?",
            (record.collection, record.client, record.id),
        )
        if found.fetchone() is None:
            raise RecordNotFound
    _write(connection, writes)


def _write(connection: sqlite3.Connection, writes: Writes) -> None:
    if writes.answer is not None:
        _keep_answer(connection, writes.answer)
    if writes.tasks:
        _insert(connection, writes.tasks, writes.batch_id)
    for record in writes.removed:
        connection.execute(_REMOVE, (record.collection, record.client, record.id))
    for record in writes.records:
        connection.execute(
            """
            INSERT INTO records (collection, client, id, body, created_at) VALUES (?, ?, ?, ?, ?)
            ON CONFLICT (collection, client, id) DO UPDATE SET body = excluded.body
            """,
            (record.collection, record.client, record.id, to_json(record.body), record.created_at),
        )


def _keep_answer(connection: sqlite3.Connection, answer: Answer) -> None:
    expired = answer.created_at - ANSWERS_LIVE_SECONDS
    connection.execute(
        "DELETE FROM answers WHERE key = ? AND created_at < ?", (answer.key, expired)
    )
    kept = connection.execute(
        """
        INSERT INTO answers (key, fingerprint, body, location, created_at)
        VALUES (:key, :fingerprint, :body, :location, :created_at)
        ON CONFLICT (key) DO NOTHING
        """,
        asdict(answer),
    )
    if kept.rowcount == 0:
        row = connection.execute(
            "SELECT key, fingerprint, body, location, created_at FROM answers WHERE key = ?",
            (answer.key,),
        ).fetchone()
        raise KeyTaken(Answer(*row))


@cache
def _claim(kinds: int) -> str:
    """Give the statement that claims tasks of so many kinds.

    For each kind it reads two ranges of the index, in the order of due times, and merges them. So
    it takes no more steps if a million tasks of another kind wait.
    """
    ranges = "UNION ALL".join(
        f"""
        SELECT due_at, seq FROM tasks INDEXED BY tasks_due
        WHERE {_WAITS} AND kind = :kind_{n} AND {when}
        """
        for n in range(kinds)
        for when in ("timed = 0", "timed = 1 AND due_at <= :now")
    )
    names = ", ".join(f":kind_{n}" for n in range(kinds))
    return f"""
        UPDATE tasks
        SET status = 'running', attempts = attempts + 1, claims = claims + 1,
            owner = :owner, lease_expires_at = :now + :lease,
            started_at = coalesce(started_at, :now), updated_at = :now
        WHERE seq IN (
            SELECT * FROM (
                SELECT seq FROM tasks INDEXED BY tasks_suspect
                WHERE status IN {_names(WAITING)} AND crashes > 0 AND kind IN ({names})
                AND (timed = 0 OR due_at <= :now)
                ORDER BY due_at, seq LIMIT :suspect  -- one, or none
            ) UNION ALL SELECT * FROM (
                SELECT seq FROM ({ranges} ORDER BY due_at, seq LIMIT :limit)
            ) LIMIT :limit
        )
        RETURNING {_TASK}
        """


def _requeue_expired(connection: sqlite3.Connection, owner: str, now: float) -> list[Task]:
    """Re-queue running tasks of other owners whose lease has expired.

    A task fails instead if it has crashed too often in a row, or if that was its last attempt.
    """
    rows = connection.execute(
        f"""
        UPDATE tasks INDEXED BY tasks_held
        SET crashes = crashes + 1, owner = NULL, lease_expires_at = NULL, error = :crash,
            updated_at = :now, due_at = :now,
            status = iif(crashes + 1 >= :most OR attempts >= max_attempts, 'failed', 'retrying'),
            finished_at = iif(crashes + 1 >= :most OR attempts >= max_attempts, :now, NULL)
        WHERE status = 'running' AND lease_expires_at <= :now AND owner <> :owner
        RETURNING {_TASK}
        """,
        {"now": now, "most": MAX_CRASHES, "owner": owner, "crash": WORKER_DIED},
    ).fetchall()
    return [_task(row) for row in rows]


def _get(connection: sqlite3.Connection, task_id: str) -> Task:
    task = _first(connection.execute(f"SELECT {_TASK} FROM tasks WHERE id = ?", (task_id,)))
    if task is None:
        raise TaskNotFound
    return task


def _first(rows: Iterable[Row]) -> Task | None:
    for row in rows:
        return _task(row)
    return None


def _task(row: Row) -> Task:
    values = dict(zip(_COLUMNS, row, strict=True))
    values["status"] = _STATUSES[values["status"]]
    return Task(**values)


def _record(row: Row) -> Record:
    collection, client, record_id, body, created_at = row
    return Record(collection, client, record_id, json.loads(body), created_at)
