"""The engine for several processes and machines: one PostgreSQL table, claimed with SKIP LOCKED."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import asyncpg

from afterward.engines.postgres import statements
from afterward.engines.postgres.batcher import Batcher
from afterward.engines.postgres.event_relay import CHANNEL, EventRelay
from afterward.engines.postgres.listener import ListeningConnection
from afterward.engines.postgres.outages import Outages
from afterward.engines.postgres.schema import (
    Session,
    Troubles,
    check,
    connect,
    is_our_mistake,
    is_refusal,
    options,
)
from afterward.engines.postgres.statements import RECORD, TASK, TASKS_CHANNEL, Settlement
from afterward.errors import (
    BatchNotFound,
    CommitUnknown,
    QueueFull,
    QueueUnavailable,
    RecordNotFound,
    TaskHasStarted,
    TaskNotGivenUp,
)
from afterward.events import Event, Subscriber
from afterward.retry import WORKER_DIED
from afterward.task import Backlog, Claim, Outcome, Record, Status, Task, Writes, to_json

CONNECTIONS = 5  # of one process; and one more that listens
CLOSE_SECONDS = 3.0  # for connections to end in an orderly way


class Postgres:
    """An Engine on a PostgreSQL database. See Engine for what each method promises.

    A task is one row. A worker claims it by setting `owner` and `lease_until`, and every later
    statement about that attempt names the claim's number, so a worker that comes back too late
    changes nothing. Only the database's clock decides what is ready and whose lease has run out.

    Claims skip rows that others have locked; whatever waits for a row lock takes its locks in the
    order of `seq`. So there are no deadlocks.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._pool: asyncpg.Pool[Any]
        self._put = Batcher(self._put_all)
        self._settle = Batcher(self._settle_all)
        self._arrived = asyncio.Event()
        # The attempts that this process has claimed and not settled yet, by id and claims.
        self._held: dict[tuple[str, int], Task] = {}
        self._outages = Outages(QueueUnavailable)
        self._event_relay = EventRelay(self._notify, self.get)
        self._listener = ListeningConnection(
            lambda: asyncpg.connect(**options(url)), self._arrived.set
        )

    async def start(self) -> None:
        connection = await connect(self._url)
        try:
            await check(connection)
        except BaseException:
            await connection.close()
            raise
        self._listener.listen(TASKS_CHANNEL, lambda _: self._arrived.set())
        self._listener.start(connection)
        self._pool = await asyncpg.create_pool(
            **options(self._url), min_size=0, max_size=CONNECTIONS, reset=_nothing_to_reset
        )

    async def stop(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_SECONDS):
                await asyncio.gather(
                    self._put.finish(), self._settle.finish(), self._event_relay.finish()
                )
        await self._listener.stop()
        try:
            async with asyncio.timeout(CLOSE_SECONDS):
                await self._pool.close()
        except (TimeoutError, *Troubles):
            self._pool.terminate()

    # What the API asks.

    async def put(self, writes: Writes) -> None:
        await self._put(writes)
        if writes.tasks:
            self._arrived.set()

    async def _put_all(self, several: Sequence[Writes]) -> Sequence[Exception | None]:
        """Write what several requests put, in one transaction.

        Writes whose idempotency key is taken are left out, and writes of which a record that is to
        be removed is gone.
        """
        async with (
            self._session() if statements.fits_in_one(several) else self._transaction() as session
        ):
            gone = await statements.lock_removed(session, several)
            answers = [
                w.answer if lost is None else None for w, lost in zip(several, gone, strict=True)
            ]
            taken = await statements.keep_answers(session, answers)
            refusals = [lost or key for lost, key in zip(gone, taken, strict=True)]
            accepted = [w for w, refusal in zip(several, refusals, strict=True) if refusal is None]
            await statements.insert(session, accepted)
        return refusals

    async def get(self, task_id: str) -> Task:
        async with self._session() as session:
            return await statements.read_task(session, task_id)

    async def list_tasks(
        self,
        *,
        client: str,
        status: Status | None,
        kind: str | None,
        after: str | None,
        limit: int,
    ) -> list[Task]:
        # A condition that is not asked for is left out: else one plan would have to fit all cases.
        # Only clients with a name have an index, which is used if this is said.
        named = "client = $2 AND client <> ''" if client else "client = $2"
        filters = {"status = ${}": status, "kind = ${}": kind, "id < ${}": after}
        chosen = {sql: value for sql, value in filters.items() if value is not None}
        conditions = [sql.format(number) for number, sql in enumerate(chosen, start=3)]
        where = " AND ".join([named, *conditions])
        async with self._session() as session:
            rows = await session.fetch(
                f"SELECT {TASK} FROM afterward.tasks WHERE {where} ORDER BY id DESC LIMIT $1",
                limit,
                client,
                *chosen.values(),
            )
        return [statements.to_task(row) for row in rows]

    async def count_batch(self, batch_id: str, *, client: str) -> dict[Status, int]:
        async with self._session() as session:
            rows = await session.fetch(
                """
                SELECT status, sum(tasks)::bigint AS tasks FROM (
                    SELECT status, 1 FROM afterward.tasks WHERE batch_id = $1 AND client = $2
                    UNION ALL
                    SELECT status, tasks FROM afterward.removed WHERE batch_id = $1 AND client = $2
                ) AS parts (status, tasks) GROUP BY status
                """,
                batch_id,
                client,
            )
        if not rows:
            raise BatchNotFound
        return dict.fromkeys(Status, 0) | {Status(row["status"]): row["tasks"] for row in rows}

    async def cancel(self, task_id: str, now: float) -> Task:
        async with self._session() as session:
            row = await session.fetchrow(
                f"""
                UPDATE afterward.tasks SET status = 'cancelled', updated_at = $2, finished_at = $2
                WHERE id = $1 AND status IN ('queued', 'retrying') RETURNING {TASK}
                """,
                task_id,
                now,
            )
            if row is None:
                await statements.read_task(session, task_id)  # raises TaskNotFound
                raise TaskHasStarted
            return statements.to_task(row)

    async def retry(
        self,
        task_id: str,
        now: float,
        writes: Writes,
        *,
        max_attempts: int | None,
        gives_up_at: float | None,
    ) -> Task:
        async with self._transaction() as session:
            (taken,) = await statements.keep_answers(session, [writes.answer])
            if taken is not None:
                raise taken
            row = await session.fetchrow(
                f"""
                WITH woken AS (SELECT pg_notify('{TASKS_CHANNEL}', ''))
                UPDATE afterward.tasks
                SET status = 'queued', attempts = 0, max_attempts = $3, gives_up_at = $4,
                    errors = 0, crashes = 0, progress = NULL, result = NULL, error = NULL,
                    started_at = NULL, finished_at = NULL, updated_at = $2, due_at = $2,
                    ready_at = now()
                FROM woken
                WHERE id = $1 AND status IN ('failed', 'cancelled') RETURNING {TASK}
                """,
                task_id,
                now,
                max_attempts,
                gives_up_at,
            )
            if row is None:
                await statements.read_task(session, task_id)  # raises TaskNotFound
                raise TaskNotGivenUp
            task = statements.to_task(row)
        self._arrived.set()
        return task

    async def backlog(self) -> Backlog:
        async with self._session() as session:
            counts = await session.fetch(
                "SELECT status, sum(tasks)::bigint AS tasks FROM afterward.counts GROUP BY status"
            )
            oldest = await session.fetchval(statements.OLDEST)
        none = dict.fromkeys(Status, 0)
        return Backlog(none | {Status(row["status"]): row["tasks"] for row in counts}, oldest)

    async def check(self) -> None:
        async with self._session() as session:
            await session.execute("UPDATE afterward.counts SET tasks = tasks WHERE FALSE")

    # What a worker asks.

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
        """See Engine.claim.

        No lease could be extended while the database was away, so the length of an outage is added
        to every lease. A worker never re-queues an attempt that it holds itself, because only its
        heartbeat was late. But it does re-queue a task that an earlier claim gave to it if the
        answer to that claim was lost, because no attempt runs.
        """
        held = [attempt for attempt, task in self._held.items() if task.owner == owner]
        async with self._session() as session:
            rows = await session.fetch(
                statements.CLAIM,
                owner,
                list(kinds),
                limit,
                int(suspect),
                timedelta(seconds=lease),
                now,
                timedelta(seconds=self._outages.recent(lease)),
                [task_id for task_id, _ in held],
                [claims for _, claims in held],
                WORKER_DIED,
            )
        rows.sort(key=lambda row: (row["due_at"], row["seq"]))
        tasks = [statements.to_task(row) for row in rows]
        running = tuple(task for task in tasks if task.status is Status.RUNNING)
        recovered = tuple(task for task in tasks if task.status is not Status.RUNNING)
        self._held |= {(task.id, task.claims): task for task in running}
        return Claim(running, recovered)

    async def extend(
        self,
        owner: str,
        *,
        now: float,  # noqa: ARG002 - the database's clock counts
        lease: float,
    ) -> set[tuple[str, int]]:
        held = [attempt for attempt, task in self._held.items() if task.owner == owner]
        async with self._session() as session:
            rows = await session.fetch(
                """
                WITH held AS (
                    SELECT seq FROM afterward.tasks
                    JOIN unnest($1::text[], $2::int[]) AS attempts (id, claims) USING (id, claims)
                    WHERE status = 'running' AND owner = $3
                    ORDER BY seq + 0 FOR UPDATE OF tasks  -- an expression: see end_attempts
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

    async def settle(self, task: Task, outcome: Outcome, now: float) -> Task | None:
        settled = await self._settle(Settlement(task, outcome, now))
        self._held.pop((task.id, task.claims), None)
        if outcome.follow_ups.tasks:
            self._arrived.set()
        return settled

    async def _settle_all(self, settlements: Sequence[Settlement]) -> list[Task | None]:
        """Write how several attempts ended, and their follow-ups, in one transaction."""
        more = any(settlement.outcome.follow_ups != Writes() for settlement in settlements)
        async with self._transaction() if more else self._session() as session:
            settled = await statements.end_attempts(session, settlements)
            follow_ups = [s.outcome.follow_ups for s in settlements if s.attempt in settled]
            await statements.insert(session, follow_ups)
            if lost := [s for s in settlements if s.attempt not in settled]:
                settled |= await statements.settled_before(session, lost)
            return [settled.get(settlement.attempt) for settlement in settlements]

    async def report(self, task: Task, progress: float, now: float) -> Task | None:
        async with self._session() as session:
            row = await session.fetchrow(
                f"""
                UPDATE afterward.tasks SET progress = $1, updated_at = $2
                WHERE id = $3 AND status = 'running' AND claims = $4 RETURNING {TASK}
                """,
                progress,
                now,
                task.id,
                task.claims,
            )
        return None if row is None else statements.to_task(row)

    async def pull_forward(self, *, now: float, longest_wait: float) -> None:
        async with self._session() as session:
            await session.execute(statements.PULL_FORWARD, now, timedelta(seconds=longest_wait))

    async def wait_for_tasks(self, at_most: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(at_most):
                await self._arrived.wait()
        self._arrived.clear()

    async def purge(self, *, finished_before: float, answered_before: float, limit: int) -> int:
        async with self._session() as session:
            tasks = await session.execute(
                """
                DELETE FROM afterward.tasks WHERE seq IN (
                    SELECT seq FROM afterward.tasks WHERE finished_at < $1
                    ORDER BY finished_at LIMIT $2 FOR UPDATE SKIP LOCKED
                )
                """,
                finished_before,
                limit,
            )
            answers = await session.execute(
                """
                DELETE FROM afterward.answers WHERE key IN (
                    SELECT key FROM afterward.answers WHERE created_at < $1
                    ORDER BY created_at LIMIT $2 FOR UPDATE SKIP LOCKED
                )
                """,
                answered_before,
                limit,
            )
            await session.execute(
                """
                DELETE FROM afterward.removed WHERE NOT EXISTS (
                    SELECT FROM afterward.tasks WHERE tasks.batch_id = removed.batch_id
                )
                """
            )
            await session.execute(
                """
                WITH gone AS (DELETE FROM afterward.counts RETURNING status, tasks)
                INSERT INTO afterward.counts SELECT status, sum(tasks) FROM gone GROUP BY status
                """
            )
        return statements.affected(tasks) + statements.affected(answers)

    # Documents beside the tasks.

    async def read_record(self, collection: str, record_id: str, *, client: str | None) -> Record:
        whose = [] if client is None else [client]
        async with self._session() as session:
            row = await session.fetchrow(
                f"""
                SELECT {RECORD} FROM afterward.records
                WHERE collection = $1 AND id = $2 {"AND client = $3" if whose else ""}
                """,
                collection,
                record_id,
                *whose,
            )
        if row is None:
            raise RecordNotFound
        return statements.to_record(row)

    async def list_records(
        self, collection: str, *, client: str, after: str | None, limit: int
    ) -> list[Record]:
        async with self._session() as session:
            rows = await session.fetch(
                f"""
                SELECT {RECORD} FROM afterward.records
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
        async with self._session() as session:
            done = await session.execute(
                """
                UPDATE afterward.records SET body = $1
                WHERE collection = $2 AND client = $3 AND id = $4
                """,
                to_json(record.body),
                record.collection,
                record.client,
                record.id,
            )
        return statements.affected(done) == 1

    async def delete_record(self, record: Record) -> bool:
        async with self._session() as session:
            done = await session.execute(
                "DELETE FROM afterward.records WHERE collection = $1 AND client = $2 AND id = $3",
                record.collection,
                record.client,
                record.id,
            )
        return statements.affected(done) == 1

    # What other processes do.

    def publish(self, event: Event) -> None:
        self._event_relay.publish(event)

    def subscribe(self, *subscribers: Subscriber) -> None:
        self._event_relay.subscribe(subscribers)
        self._listener.listen(CHANNEL, self._event_relay.receive)

    async def _notify(self, payloads: Sequence[str]) -> bool:
        async with self._session() as session:
            return await self._listener.notify(session, CHANNEL, payloads)

    # Connections

    @contextlib.asynccontextmanager
    async def _session(self) -> AsyncIterator[Session]:
        """A connection; each statement on it is a transaction of its own."""
        with self._outages.noticed(), _troubles_translated() as commit:
            async with self._pool.acquire(timeout=5) as session:
                commit.may_be_sent = True
                yield session

    @contextlib.asynccontextmanager
    async def _transaction(self) -> AsyncIterator[Session]:
        """A connection in a transaction, which is committed at the end."""
        with self._outages.noticed(), _troubles_translated() as commit:
            async with self._pool.acquire(timeout=5) as session, session.transaction():
                yield session
                commit.may_be_sent = True


async def _nothing_to_reset(_: Session) -> None:
    """Sessions are left as they were found, so that a round trip can be saved."""


@dataclass(slots=True)
class _Commit:
    may_be_sent: bool = False


@contextlib.contextmanager
def _troubles_translated() -> Iterator[_Commit]:
    """Raise errors of the database as QueueFull, CommitUnknown or QueueUnavailable."""
    commit = _Commit()
    try:
        yield commit
    except asyncpg.DiskFullError as error:
        raise QueueFull from error
    except Troubles as error:
        if is_our_mistake(error):
            raise
        if commit.may_be_sent and not is_refusal(error):
            raise CommitUnknown from error
        raise QueueUnavailable from error
