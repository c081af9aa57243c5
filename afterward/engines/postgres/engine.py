"""The engine on PostgreSQL, for several machines: one table, claimed FOR UPDATE SKIP LOCKED."""

import asyncio
import contextlib
import time
from collections.abc import Callable, Collection, Sequence
from datetime import timedelta

import asyncpg

from afterward.bulk import Action, Slice
from afterward.engine import Engine
from afterward.engines.postgres import bulk, changes, retention, search, statements
from afterward.engines.postgres.batcher import Batcher
from afterward.engines.postgres.callers_transaction import insert_through
from afterward.engines.postgres.connections import (
    CLOSE_SECONDS,
    Pool,
    connect,
    connection_options,
    explain_refusal,
)
from afterward.engines.postgres.event_relay import CHANNEL, EventRelay, GapSubscriber
from afterward.engines.postgres.listener import ListeningConnection
from afterward.engines.postgres.schema import check
from afterward.engines.postgres.statements import (
    RECORD_COLUMNS,
    TASK_COLUMNS,
    TASKS_CHANNEL,
    Settlement,
)
from afterward.errors import (
    BatchNotFound,
    RecordNotFound,
    TaskHasStarted,
    TaskNotGivenUp,
    TaskNotRetrying,
)
from afterward.events import Event, Subscriber
from afterward.filter import FailureGroup, TaskFilter
from afterward.history import error_group
from afterward.retry import WORKER_DIED, Bounds
from afterward.task import Answer, Backlog, Claim, Outcome, Record, Status, Task, Writes, to_json


class _RecordsTaken(Exception):
    """A unit of work is refused because of its key, and was to remove records.

    The units after it were checked as if these records were gone. So the batcher writes each unit
    in a transaction of its own.
    """


class Postgres(Engine):
    """An Engine on a PostgreSQL database. Engine documents the methods.

    A task is one row. A worker claims it by setting `owner` and `lease_until`. Every later
    statement about this attempt compares the number of the claim, so a worker that has lost its
    claim changes nothing. The clock of the database alone decides whether a task is ready, and
    whether a lease has expired.

    Claims skip rows that other sessions have locked. Statements that wait for row locks take them
    in a fixed order: tasks by `seq`, records and answers by their keys. So there are no deadlocks.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._subscribers: list[Subscriber] = []
        self._gap_subscribers: list[GapSubscriber] = []
        self._listened_until: float | None = None  # before the last stop
        self._make_parts()

    def _make_parts(self) -> None:
        """Make the parts that belong to one event loop."""
        self._pool = Pool(self._url)
        self._put = Batcher(self._put_all)
        self._settle = Batcher(self._settle_all)
        self._tasks_added = asyncio.Event()
        # The attempts that this process has claimed and not yet settled, by the task's id and the
        # number of the claim.
        self._held: dict[tuple[str, int], Task] = {}
        self._event_relay = EventRelay(
            self._notify, self.get, self._subscribers, self._gap_subscribers
        )
        self._listener = ListeningConnection(
            lambda: asyncpg.connect(**connection_options(self._url)),
            worked_at=self._listened_until or time.time(),
        )
        if self._subscribers:
            self._listen_for_events()

    async def start(self) -> None:
        self._make_parts()
        connection = await connect(self._url)
        try:
            with explain_refusal(self._url):
                await check(connection)
                await self._pool.open()
        except BaseException:
            # A step failed, or the start was cancelled. The server may hang, so do not wait for it.
            connection.terminate()
            raise
        self._listener.listen(
            TASKS_CHANNEL,
            receive=lambda _: self._tasks_added.set(),
            on_gap=lambda _: self._tasks_added.set(),
        )
        self._listener.start(connection)

    async def stop(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_SECONDS):
                await asyncio.gather(
                    self._put.finish(), self._settle.finish(), self._event_relay.finish()
                )
        await self._listener.stop()
        self._listened_until = self._listener.worked_at
        await self._pool.close()

    # For the API

    async def put(self, writes: Writes) -> None:
        await self._put(writes)
        if writes.tasks:
            self._tasks_added.set()

    async def _put_all(self, units: Sequence[Writes]) -> Sequence[Exception | None]:
        """Write the units of work of several requests in one transaction.

        Returns KeyTaken or RecordNotFound for each unit that is refused, and None for the others.
        """
        async with (
            self._pool.session()
            if statements.fits_in_one_statement(units)
            else self._pool.transaction() as session
        ):
            # 1. Refuse units that remove a record which does not exist.
            missing = await statements.lock_records_to_remove(session, units)
            pairs = [*zip(units, missing, strict=True)]
            # 2. Of the others, refuse those with an idempotency key that is in use.
            answers = [None if error else writes.answer for writes, error in pairs]
            taken = await statements.insert_answers(session, answers)
            if len(units) > 1 and any(
                refusal and writes.removed for writes, refusal in zip(units, taken, strict=True)
            ):
                raise _RecordsTaken
            # 3. The units of step 1 may be repeated requests, whose record is missing because the
            #    first request has removed it. Then they are refused because of their key.
            answers = [writes.answer if error else None for writes, error in pairs]
            repeated = await statements.find_taken_keys(session, answers)
            # 4. Write the rest.
            refusals = [
                first or second or third
                for first, second, third in zip(repeated, missing, taken, strict=True)
            ]
            accepted = [
                writes for writes, refusal in zip(units, refusals, strict=True) if refusal is None
            ]
            await statements.write(session, accepted)
        return refusals

    async def check_key(self, answer: Answer) -> None:
        async with self._pool.session(reads_only=True) as session:
            (key_taken,) = await statements.find_taken_keys(session, [answer])
        if key_taken is not None:
            raise key_taken

    async def put_through(self, connection: object, task: Task) -> None:
        await insert_through(connection, task)

    async def get(self, task_id: str) -> Task:
        async with self._pool.session(reads_only=True) as session:
            return await statements.read_task(session, task_id)

    async def list_tasks(
        self, wanted: TaskFilter, *, after: str | None = None, limit: int
    ) -> list[Task]:
        async with self._pool.search() as session:
            return await search.list_tasks(session, wanted, after, limit)

    async def count_tasks(self, wanted: TaskFilter) -> int:
        async with self._pool.search() as session:
            return await search.count_tasks(session, wanted)

    async def count_failures(self, client: str) -> list[FailureGroup]:
        async with self._pool.search() as session:
            return await search.count_failures(session, client)

    async def list_failed(self, client: str, *, limit: int) -> list[Task]:
        async with self._pool.search() as session:
            return await search.list_failed(session, client, limit)

    async def list_changed(
        self, client: str, *, since: float, now: float, limit: int
    ) -> list[Task] | None:
        async with self._pool.search() as session:
            return await changes.list_changed(session, client, since, now, limit)

    async def count_batch(self, batch_id: str, *, client: str) -> dict[Status, int]:
        async with self._pool.search() as session:
            rows = await session.fetch(
                """
                SELECT status, sum(tasks)::bigint AS tasks FROM (
                    -- the tasks that are still there
                    SELECT status, 1 FROM afterward.tasks WHERE batch_id = $1 AND client = $2
                    UNION ALL
                    -- the tasks that retention has removed
                    SELECT status, tasks FROM afterward.removed WHERE batch_id = $1 AND client = $2
                ) AS parts (status, tasks) GROUP BY status
                """,
                batch_id,
                client,
            )
        if not rows:
            raise BatchNotFound
        return dict.fromkeys(Status, 0) | {Status(row["status"]): row["tasks"] for row in rows}

    async def list_batches(self, client: str, *, after: str | None = None, limit: int) -> list[str]:
        async with self._pool.search() as session:
            return await search.list_batches(session, client, after, limit)

    async def cancel(self, task_id: str, now: float) -> Task:
        async with self._pool.session() as session:
            for row in await statements.cancel(session, [task_id], now):
                return statements.to_task(row)
            await statements.read_task(session, task_id)  # raises TaskNotFound
            raise TaskHasStarted

    async def retry(
        self,
        task_id: str,
        now: float,
        writes: Writes,
        *,
        max_attempts: int | None,
        gives_up_at: float | None,
    ) -> Task:
        async with self._pool.transaction() as session:
            (key_taken,) = await statements.insert_answers(session, [writes.answer])
            if key_taken is not None:
                raise key_taken
            bounds = {task_id: Bounds(max_attempts, gives_up_at)}
            rows = await statements.queue_again(session, bounds, now)
            if not rows:
                await statements.read_task(session, task_id)  # raises TaskNotFound
                raise TaskNotGivenUp
            task = statements.to_task(rows[0])
        self._tasks_added.set()
        return task

    async def run_now(self, task_id: str, now: float) -> Task:
        async with self._pool.session() as session:
            row = await session.fetchrow(
                f"""
                WITH woken AS (SELECT pg_notify('{TASKS_CHANNEL}', ''))
                UPDATE afterward.tasks SET due_at = $2, updated_at = $2, ready_at = now()
                FROM woken WHERE id = $1 AND status = 'retrying' RETURNING {TASK_COLUMNS}
                """,
                task_id,
                now,
            )
            if row is None:
                await statements.read_task(session, task_id)  # raises TaskNotFound
                raise TaskNotRetrying
            task = statements.to_task(row)
        self._tasks_added.set()
        return task

    async def backlog(self) -> Backlog:
        async with self._pool.session(reads_only=True) as session:
            counts = await session.fetch(
                "SELECT status, sum(tasks)::bigint AS tasks FROM afterward.counts GROUP BY status"
            )
            oldest = await session.fetchval(statements.OLDEST)
        zeros = dict.fromkeys(Status, 0)
        return Backlog(zeros | {Status(row["status"]): row["tasks"] for row in counts}, oldest)

    async def oldest_queued(self, client: str) -> float | None:
        async with self._pool.search() as session:
            return await search.oldest_queued(session, client)

    async def check(self) -> None:
        async with self._pool.session(reads_only=True) as session:
            # This changes no row, but a read-only database refuses it.
            await session.execute("UPDATE afterward.counts SET tasks = tasks WHERE FALSE")

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
        """See Engine.claim.

        No worker can extend its lease during an outage of the database, so the length of an outage
        is added to every lease. A worker does not re-queue attempts that it holds itself, because
        only its heartbeat is late. But it does re-queue a task of its own if it does not know of
        the attempt, because the reply to the claim was lost.
        """
        held = self._held_by(owner)
        async with self._pool.session() as session:
            rows = await session.fetch(
                statements.CLAIM,
                owner,
                list(kinds),
                limit,
                int(suspect),
                timedelta(seconds=lease),
                now,
                timedelta(seconds=self._pool.outages.recent_seconds(lease)),
                [task_id for task_id, _ in held],
                [claims for _, claims in held],
                WORKER_DIED,
                error_group(WORKER_DIED),
                list(urgent),
            )
        # UNION ALL and RETURNING have no order.
        rows.sort(key=lambda row: (row["kind"] not in urgent, row["due_at"], row["seq"]))
        tasks = [statements.to_task(row) for row in rows]
        running = tuple(task for task in tasks if task.status is Status.RUNNING)
        recovered = tuple(task for task in tasks if task.status is not Status.RUNNING)
        self._held |= {(task.id, task.claims): task for task in running}
        return Claim(running, recovered)

    async def extend(
        self,
        owner: str,
        *,
        now: float,  # noqa: ARG002 - leases are by the clock of the database
        lease: float,
    ) -> set[tuple[str, int]]:
        # Extend only the attempts that this process knows of. If the reply to a claim was lost, no
        # attempt is running, and the lease must expire.
        held = self._held_by(owner)
        async with self._pool.session() as session:
            rows = await session.fetch(
                """
                WITH held AS (
                    SELECT seq FROM afterward.tasks
                    JOIN unnest($1::text[], $2::int[]) AS attempts (id, claims) USING (id, claims)
                    WHERE status = 'running' AND owner = $3
                    ORDER BY seq + 0 FOR UPDATE OF tasks  -- see statements.end_attempts
                )
                UPDATE afterward.tasks SET lease_until = now() + $4
                FROM held WHERE tasks.seq = held.seq RETURNING tasks.id, tasks.claims
                """,
                [task_id for task_id, _ in held],
                [claims for _, claims in held],
                owner,
                timedelta(seconds=lease),
            )
        return {(row["id"], row["claims"]) for row in rows}

    def _held_by(self, owner: str) -> list[tuple[str, int]]:
        return [attempt for attempt, task in self._held.items() if task.owner == owner]

    async def settle(self, task: Task, outcome: Outcome, now: float) -> Task | None:
        settled = await self._settle(Settlement(task, outcome, now))
        self._held.pop((task.id, task.claims), None)
        if outcome.follow_ups.tasks:
            self._tasks_added.set()
        return settled

    async def _settle_all(self, settlements: Sequence[Settlement]) -> list[Task | None]:
        """Write how several attempts ended, and their follow-ups, in one transaction.

        Returns each task after the change, or None if the worker had lost its claim.
        """
        has_follow_ups = any(s.outcome.follow_ups != Writes() for s in settlements)
        async with self._pool.transaction() if has_follow_ups else self._pool.session() as session:
            # 1. Settle the attempts that still hold their tasks, and write their follow-ups.
            settled = await statements.end_attempts(session, settlements)
            follow_ups = [s.outcome.follow_ups for s in settlements if s.attempt in settled]
            await statements.write(session, follow_ups)
            # 2. The others have lost their claims, or an earlier try has settled them already and
            #    its reply was lost.
            if rest := [s for s in settlements if s.attempt not in settled]:
                settled |= await statements.read_already_settled(session, rest)
            return [settled.get(settlement.attempt) for settlement in settlements]

    async def report(self, task: Task, progress: float, now: float) -> Task | None:
        async with self._pool.session() as session:
            row = await session.fetchrow(
                f"""
                UPDATE afterward.tasks SET progress = $1, updated_at = $2
                WHERE id = $3 AND status = 'running' AND claims = $4 RETURNING {TASK_COLUMNS}
                """,
                progress,
                now,
                task.id,
                task.claims,
            )
        return None if row is None else statements.to_task(row)

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
        async with self._pool.transaction() as session:
            piece = await bulk.change_slice(session, task, wanted, limit, most, bounds_of, now)
        if wanted.allows is Action.RETRY:
            self._tasks_added.set()
        return piece

    async def pull_forward(
        self, *, kinds: Sequence[str], now: float, longest_wait: float, limit: int
    ) -> int:
        async with self._pool.session() as session:
            command_tag = await session.execute(
                statements.PULL_FORWARD, list(kinds), now, timedelta(seconds=longest_wait), limit
            )
        return statements.row_count(command_tag)

    async def wait_for_tasks(self, at_most: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(at_most):
                await self._tasks_added.wait()
        self._tasks_added.clear()

    async def purge(
        self,
        *,
        finished_before: float,
        failed_before: float,
        answered_before: float,
        limit: int,
    ) -> int:
        async with self._pool.session() as session:
            tasks = await retention.purge_tasks(session, finished_before, failed_before, limit)
            return tasks + await retention.purge_answers(session, answered_before, limit)

    # Records

    async def read_record(self, collection: str, record_id: str, *, client: str | None) -> Record:
        clients = [] if client is None else [client]
        async with self._pool.session(reads_only=True) as session:
            row = await session.fetchrow(
                f"""
                SELECT {RECORD_COLUMNS} FROM afterward.records
                WHERE collection = $1 AND id = $2 {"AND client = $3" if clients else ""}
                """,
                collection,
                record_id,
                *clients,
            )
        if row is None:
            raise RecordNotFound
        return statements.to_record(row)

    async def list_records(
        self, collection: str, *, client: str, after: str | None, limit: int
    ) -> list[Record]:
        async with self._pool.session(reads_only=True) as session:
            rows = await session.fetch(
                f"""
                SELECT {RECORD_COLUMNS} FROM afterward.records
                WHERE collection = $1 AND client = $2 AND ($3::text IS NULL OR id < $3)
                ORDER BY id DESC LIMIT $4
                """,
                collection,
                client,
                after,
                limit,
            )
        return [statements.to_record(row) for row in rows]

    async def update_record(self, record: Record) -> bool:
        async with self._pool.session() as session:
            command_tag = await session.execute(
                """
                UPDATE afterward.records SET body = $1
                WHERE collection = $2 AND client = $3 AND id = $4
                """,
                to_json(record.body),
                record.collection,
                record.client,
                record.id,
            )
        return statements.row_count(command_tag) == 1

    async def delete_record(self, record: Record) -> bool:
        async with self._pool.session() as session:
            command_tag = await session.execute(
                "DELETE FROM afterward.records WHERE collection = $1 AND client = $2 AND id = $3",
                record.collection,
                record.client,
                record.id,
            )
        return statements.row_count(command_tag) == 1

    # Events of other processes

    def publish(self, event: Event) -> None:
        self._event_relay.publish(event)

    def subscribe(self, *subscribers: Subscriber) -> None:
        self._subscribers += subscribers
        self._listen_for_events()

    def subscribe_to_gaps(self, *subscribers: GapSubscriber) -> None:
        self._gap_subscribers += subscribers

    def _listen_for_events(self) -> None:
        self._listener.listen(
            CHANNEL, receive=self._event_relay.receive, on_gap=self._event_relay.tell_of_gap
        )

    async def _notify(self, payloads: Sequence[str]) -> bool:
        async with self._pool.session(reads_only=True) as session:
            return await self._listener.notify(session, CHANNEL, payloads)
