"""The engine on SQLite, in WAL mode. One process uses the file."""

import asyncio
import contextlib
import os
import sqlite3
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import structlog

from afterward.bulk import Action, Slice
from afterward.engine import Engine
from afterward.engines.sqlite import bulk, changes, retention, search, statements
from afterward.engines.sqlite.damage_check import BackgroundCheck
from afterward.engines.sqlite.database_file import (
    SCHEMA_VERSION,
    check_database,
    check_version,
    lock,
    open_database,
    open_for_searches,
)
from afterward.engines.sqlite.group_commit import GroupCommit
from afterward.engines.sqlite.statements import RECORD_COLUMNS, status_list
from afterward.errors import (
    BatchNotFound,
    QueueDamaged,
    RecordNotFound,
    TaskHasStarted,
    TaskNotGivenUp,
    TaskNotRetrying,
)
from afterward.events import Event, Subscriber
from afterward.filter import FailureGroup, TaskFilter
from afterward.retry import Bounds
from afterward.task import (
    GIVEN_UP,
    WAITING,
    Answer,
    Backlog,
    Claim,
    Outcome,
    Record,
    Status,
    Task,
    Writes,
    restore_task,
    to_json,
)

log = structlog.get_logger(__name__)


class SQLite(Engine):
    """An Engine on one SQLite file. Engine documents the methods.

    Every operation goes through `GroupCommit`, which lets operations share a transaction and its
    fsync. Searches have a connection and a thread of their own: a count of a million tasks takes
    0.3 s, and no commit waits for it. `lock` keeps a second process from opening the file. Once
    damage to the file is found, no task is accepted or claimed. The next start checks the file
    again.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock: int
        self._commits = GroupCommit(self._open, self._report_damage)
        self._searches = GroupCommit(
            lambda: open_for_searches(path), self._report_damage, reads_only=True
        )
        self._check: BackgroundCheck | None = None  # None if the start has checked the whole file
        self._damage: Exception | None = None
        self._tasks_added = asyncio.Event()

    async def start(self) -> None:
        check_version()
        self._tasks_added = asyncio.Event()
        self._lock = lock(self._path)
        async with contextlib.AsyncExitStack() as after_an_error:
            after_an_error.callback(self._unlock)
            await self._commits.start()
            after_an_error.push_async_callback(self._commits.stop)
            await self._searches.start()
            after_an_error.push_async_callback(self._searches.stop)
            if self._check is not None:
                self._check.start()  # raises RuntimeError if the system allows no more threads
            after_an_error.pop_all()

    def _open(self) -> sqlite3.Connection:
        is_checked = check_database(self._path)
        connection = open_database(self._path)
        self._damage = None
        self._check = None if is_checked else BackgroundCheck(self._path, self._report_damage)
        return connection

    def _report_damage(self, error: Exception) -> None:
        """Refuse new work from now on. Threads call this."""
        if self._damage is None:
            self._damage = error
            with contextlib.suppress(Exception):  # the disk of the log may be full
                log.error(
                    "database damaged",
                    file=str(self._path),
                    error=str(error),
                    effect="no task is accepted or started; running tasks end, and tasks can be "
                    "read",
                    remedy="stop the service, and restore the file from a backup, or repair it "
                    "with sqlite3's .recover",
                )

    def _refuse_if_damaged(self) -> None:
        if self._damage is not None:
            raise QueueDamaged from self._damage

    async def stop(self) -> None:
        async with contextlib.AsyncExitStack() as steps:  # the last step first
            steps.callback(self._unlock)
            steps.push_async_callback(self._commits.stop)
            # SQLite removes the WAL when the last connection is closed, if that connection may
            # write. So the connections that only read are closed before.
            steps.push_async_callback(self._searches.stop)
            if self._check is not None:
                steps.push_async_callback(asyncio.to_thread, self._check.stop)

    def _unlock(self) -> None:
        # If the disk hangs, a commit may still be under way. Then this process holds the lock until
        # it ends, so that no other process opens the file during that commit.
        if not self._commits.is_using_file:
            os.close(self._lock)

    # For the API

    async def put(self, writes: Writes) -> None:
        self._refuse_if_damaged()
        if writes.tasks:
            self._wake_worker()
        match writes:
            # The common case: a request adds one task and nothing else. Such requests share an
            # INSERT.
            case Writes(tasks=(task,), records=(), answer=None, removed=()):
                await self._commits.run_merged(statements.insert_tasks, task)
            case _:
                await self._commits.run(lambda connection: statements.put(connection, writes))

    async def check_key(self, answer: Answer) -> None:
        await self._commits.run(lambda connection: statements.check_key(connection, answer))

    async def put_through(self, connection: object, task: Task) -> None:  # noqa: ARG002
        raise RuntimeError(
            "The queue is in a SQLite file of its own, so a task cannot be part of your "
            "transaction. Keep an outbox table beside your rows, as "
            "examples/4_your_own_database.py does, or keep the queue on PostgreSQL, in the "
            "database of your rows."
        )

    async def get(self, task_id: str) -> Task:
        return await self._commits.run(lambda connection: statements.read_task(connection, task_id))

    async def list_tasks(
        self, wanted: TaskFilter, *, after: str | None = None, limit: int
    ) -> list[Task]:
        return await self._searches.run(
            lambda connection: search.list_tasks(connection, wanted, after, limit)
        )

    async def count_tasks(self, wanted: TaskFilter) -> int:
        return await self._searches.run(lambda connection: search.count_tasks(connection, wanted))

    async def count_failures(self, client: str) -> list[FailureGroup]:
        return await self._searches.run(
            lambda connection: search.count_failures(connection, client)
        )

    async def list_failed(self, client: str, *, limit: int) -> list[Task]:
        return await self._searches.run(
            lambda connection: search.list_failed(connection, client, limit)
        )

    async def list_changed(
        self,
        client: str,
        *,
        since: float,
        now: float,  # noqa: ARG002 - all times are by the clock of the one process
        limit: int,
    ) -> list[Task] | None:
        return await self._searches.run(
            lambda connection: changes.list_changed(connection, client, since, limit)
        )

    async def count_batch(self, batch_id: str, *, client: str) -> dict[Status, int]:
        def count(connection: sqlite3.Connection) -> dict[Status, int]:
            rows = connection.execute(
                """
                SELECT status, sum(tasks) FROM (
                    -- the tasks that are still there
                    SELECT status, 1 AS tasks FROM tasks
                    WHERE batch_id = :id AND client = :client
                    UNION ALL
                    -- the tasks that retention has removed
                    SELECT status, tasks FROM removed WHERE batch_id = :id AND client = :client
                ) GROUP BY status
                """,
                {"id": batch_id, "client": client},
            )
            counts = {Status(status): tasks for status, tasks in rows}
            if not counts:
                raise BatchNotFound
            return dict.fromkeys(Status, 0) | counts

        return await self._searches.run(count)

    async def list_batches(self, client: str, *, after: str | None = None, limit: int) -> list[str]:
        return await self._searches.run(
            lambda connection: search.list_batches(connection, client, after, limit)
        )

    async def cancel(self, task_id: str, now: float) -> Task:
        return await self._update_task(
            f"{statements.CANCEL} WHERE id = :id AND status IN {status_list(WAITING)}",
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
        self._refuse_if_damaged()
        self._wake_worker()
        return await self._update_task(
            f"{statements.QUEUE_AGAIN} WHERE id = :id AND status IN {status_list(GIVEN_UP)}",
            {
                "id": task_id,
                "now": now,
                "max_attempts": max_attempts,
                "gives_up_at": gives_up_at,
            },
            TaskNotGivenUp,
            writes,
        )

    async def run_now(self, task_id: str, now: float) -> Task:
        self._wake_worker()
        return await self._update_task(
            """
            UPDATE tasks SET due_at = :now, updated_at = :now
            WHERE id = :id AND status = 'retrying'
            """,
            {"id": task_id, "now": now},
            TaskNotRetrying,
        )

    async def _update_task(
        self,
        update: str,
        values: dict[str, Any],
        refusal: type[Exception],
        writes: Writes | None = None,
    ) -> Task:
        """Run an UPDATE of the task `values["id"]`, and write `writes` with it.

        Raises TaskNotFound, and `refusal` if the UPDATE does not match the task.
        """

        def update_or_refuse(connection: sqlite3.Connection) -> Task:
            # Refuse before the first write. After a write, the whole group would be rolled back,
            # and each of its calls run again alone.
            answer = None if writes is None else writes.answer
            if answer is not None:
                statements.check_key(connection, answer)
            task = statements.update_task(connection, update, values)
            if task is None:
                statements.read_task(connection, values["id"])  # raises TaskNotFound
                raise refusal
            if writes is not None:
                statements.write(connection, writes)
            return task

        return await self._commits.run(update_or_refuse)

    async def backlog(self) -> Backlog:
        def count(connection: sqlite3.Connection) -> Backlog:
            counts = dict(connection.execute("SELECT status, tasks FROM counts"))
            (oldest,) = connection.execute(statements.OLDEST).fetchone()
            return Backlog({Status(status): n for status, n in counts.items()}, oldest)

        return await self._commits.run(count)

    async def oldest_queued(self, client: str) -> float | None:
        return await self._searches.run(lambda connection: search.oldest_queued(connection, client))

    async def check(self) -> None:
        self._refuse_if_damaged()

        # This writes the version that is there already, so nothing changes. But SQLite writes and
        # syncs a page, so a read-only disk is noticed.
        def write_version(connection: sqlite3.Connection) -> None:
            connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")

        await self._commits.run(write_version)

    # For a worker

    async def claim(
        self,
        owner: str,
        *,
        kinds: Sequence[str],
        urgent: Collection[str] = (),
        limit: int,
        suspect: bool = True,
        now: float,
        lease: float,
    ) -> Claim:
        self._refuse_if_damaged()
        first = [kind for kind in kinds if kind in urgent]
        kinds = [*first, *(kind for kind in kinds if kind not in urgent)]
        values = {"owner": owner, "limit": limit, "suspect": suspect, "now": now, "lease": lease}
        values |= {f"kind_{n}": kind for n, kind in enumerate(kinds)}

        def claim(connection: sqlite3.Connection) -> Claim:
            claimed: list[Task] = []
            if kinds:
                claim_due = statements.claim(len(kinds), len(first))
                claimed = [*map(restore_task, connection.execute(claim_due, values))]
                # RETURNING has no order.
                claimed.sort(key=lambda task: (task.kind not in first, task.due_at))
            recovered = statements.requeue_expired(connection, owner, now)
            return Claim(tuple(claimed), tuple(recovered))

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
            return await self._commits.run_merged(statements.settle, (task, outcome, now))

        def settle(connection: sqlite3.Connection) -> Task | None:
            (settled,) = statements.settle(connection, [(task, outcome, now)])
            if settled is not None:
                statements.write(connection, outcome.follow_ups)
            return settled

        self._wake_worker()
        return await self._commits.run(settle)

    async def report(self, task: Task, progress: float, now: float) -> Task | None:
        return await self._commits.run(
            lambda connection: statements.update_task(
                connection,
                """
                UPDATE tasks SET progress = ?, updated_at = ?
                WHERE id = ? AND status = 'running' AND claims = ?
                """,
                (progress, now, task.id, task.claims),
            )
        )

    async def change_slice(
        self,
        task: Task,
        wanted: TaskFilter,
        *,
        limit: int,
        most: int,
        bounds_of: Callable[[str], Bounds],
        now: float,
    ) -> Slice | None:
        self._refuse_if_damaged()
        if wanted.allows is Action.RETRY:
            self._wake_worker()
        return await self._commits.run(
            lambda connection: bulk.change_slice(
                connection, task, wanted, limit, most, bounds_of, now
            )
        )

    async def pull_forward(
        self, *, kinds: Sequence[str], now: float, longest_wait: float, limit: int
    ) -> int:
        values = {"kinds": to_json(kinds), "now": now, "latest": now + longest_wait, "limit": limit}
        return await self._commits.run(
            lambda connection: connection.execute(statements.PULL_FORWARD, values).rowcount
        )

    async def wait_for_tasks(self, at_most: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(at_most):
                await self._tasks_added.wait()
        self._tasks_added.clear()

    def _wake_worker(self) -> None:
        """Wake the worker for tasks that are about to be queued. Call this before the commit.

        The worker's claim then joins the transaction that queues the tasks, because `GroupCommit`
        waits some iterations of the loop. Operations run in the order of their calls, so the claim
        finds the tasks. If the commit fails, the claim finds none.
        """
        self._tasks_added.set()

    async def purge(
        self,
        *,
        finished_before: float,
        failed_before: float,
        answered_before: float,
        limit: int,
    ) -> int:
        self._refuse_if_damaged()

        return await self._commits.run(
            lambda connection: (
                retention.purge_tasks(connection, finished_before, failed_before, limit)
                + retention.purge_answers(connection, answered_before, limit)
            )
        )

    # Records

    async def read_record(self, collection: str, record_id: str, *, client: str | None) -> Record:
        of_client = "" if client is None else "AND client = :client"

        def read(connection: sqlite3.Connection) -> Record:
            row = connection.execute(
                f"""
                SELECT {RECORD_COLUMNS} FROM records
                WHERE collection = :collection {of_client} AND id = :id
                """,
                {"collection": collection, "client": client, "id": record_id},
            ).fetchone()
            if row is None:
                raise RecordNotFound
            return statements.to_record(row)

        return await self._commits.run(read)

    async def list_records(
        self, collection: str, *, client: str, after: str | None, limit: int
    ) -> list[Record]:
        def read_page(connection: sqlite3.Connection) -> list[Record]:
            rows = connection.execute(
                f"""
                SELECT {RECORD_COLUMNS} FROM records
                WHERE collection = :collection AND client = :client
                AND (:after IS NULL OR id < :after)
                ORDER BY id DESC LIMIT :limit
                """,
                {"collection": collection, "client": client, "after": after, "limit": limit},
            )
            return [statements.to_record(row) for row in rows]

        return await self._commits.run(read_page)

    async def update_record(self, record: Record) -> bool:
        def update(connection: sqlite3.Connection) -> bool:
            updated = connection.execute(
                "UPDATE records SET body = ? WHERE collection = ? AND client = ? AND id = ?",
                (to_json(record.body), record.collection, record.client, record.id),
            )
            return updated.rowcount == 1

        return await self._commits.run(update)

    async def delete_record(self, record: Record) -> bool:
        return await self._commits.run(
            lambda connection: statements.delete_record(connection, record)
        )

    # Events of other processes

    def publish(self, event: Event) -> None:
        """Do nothing, because no other process uses the file."""

    def subscribe(self, *subscribers: Subscriber) -> None:
        """Do nothing, because no other process uses the file."""

    def subscribe_to_gaps(self, *subscribers: Callable[[float], None]) -> None:
        """Do nothing, because no other process uses the file."""
