"""The engine for several processes and machines: PostgreSQL, with PGQueuer to hand out the work."""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from functools import partial
from typing import Any

import asyncpg

from app.queue import postgres_entries as entries
from app.queue.batcher import Batcher
from app.queue.errors import (
    BatchNotFound,
    QueueFull,
    QueueUnavailable,
    RecordNotFound,
    TaskHasStarted,
    TaskNotFound,
    TaskNotGivenUp,
)
from app.queue.events import Event, Listener
from app.queue.outages import Outages
from app.queue.postgres_entries import Entrypoint, Session
from app.queue.postgres_events import CHANNEL, Grapevine
from app.queue.postgres_listener import Listener as Ear
from app.queue.postgres_rows import (
    TASK,
    Row,
    Settlement,
    as_task,
    begin_attempts,
    end_attempts,
    enter_again,
    fits_in_one,
    keep_answers,
    lock_removed,
    lock_running,
    read_task,
    settled_before,
    take_back,
    write_all,
)
from app.queue.postgres_schema import Troubles, check, connect, options
from app.queue.task import (
    WAITING,
    Backlog,
    Outcome,
    Record,
    Status,
    Task,
    Writes,
    to_json,
)

CONNECTIONS = 5  # of one process; and one more that listens
LOOK_SECONDS = 0.5  # how late a suspect is claimed while there is other work
LAST_SECONDS = 3.0  # for connections to end in an orderly way
_RECORD = "collection, client, id, body, created_at"
LARGEST_LOG = 32 * 1024 * 1024  # bytes of PGQueuer's log, which nobody reads


class Postgres:
    """An Engine on a PostgreSQL database. See Engine for what each method promises.

    A row of `tasks` is the record. Its `entry` is what PGQueuer hands out for its next attempt; an
    entry that no row refers to any more means nothing, and is dropped by whoever gets it. Locks
    are taken on entries first, on rows second, as PGQueuer's claim does: so nobody waits for
    somebody who waits for him.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._pool: asyncpg.Pool[Any]
        self._put = Batcher(self._put_all)
        self._settle = Batcher(self._settle_all)
        self._arrived = asyncio.Event()
        self._held: dict[str, Task] = {}  # claimed here, and not settled yet
        self._look_at = 0.0  # when to look for suspects again, by the monotonic clock
        self._outages = Outages(*Troubles)
        self._grapevine = Grapevine(self._notify, self.get)
        self._ear = Ear(lambda: asyncpg.connect(**options(url)), self._arrived.set)

    async def start(self) -> None:
        connection = await connect(self._url)
        try:
            await check(connection)
        except BaseException:
            await connection.close()
            raise
        self._ear.listen(entries.CHANNEL, self._entries_changed)
        self._ear.start(connection)
        self._pool = await asyncpg.create_pool(
            **options(self._url), min_size=0, max_size=CONNECTIONS, reset=_nothing_to_reset
        )

    async def stop(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LAST_SECONDS):
                await asyncio.gather(
                    self._put.finish(), self._settle.finish(), self._grapevine.finish()
                )
        await self._ear.stop()
        try:
            await asyncio.wait_for(self._pool.close(), LAST_SECONDS)
        except (TimeoutError, *Troubles):
            self._pool.terminate()

    # What the API asks.

    async def put(self, writes: Writes) -> None:
        await self._put(writes)
        if writes.tasks:
            self._arrived.set()

    async def _put_all(self, several: Sequence[Writes]) -> Sequence[Exception | None]:
        """Write what several requests put, in one transaction.

        Left out are those whose key is taken, or whose record to be removed is gone.
        """
        async with self._session() if fits_in_one(several) else self._transaction() as session:
            gone = await lock_removed(session, several)
            answers = [
                w.answer if lost is None else None for w, lost in zip(several, gone, strict=True)
            ]
            taken = await keep_answers(session, answers)
            refusals = [lost or key for lost, key in zip(gone, taken, strict=True)]
            written = [w for w, refusal in zip(several, refusals, strict=True) if refusal is None]
            await write_all(session, written)
        return refusals

    async def get(self, task_id: str) -> Task:
        async with self._session() as session:
            return await read_task(session, task_id)

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
        named = "client = ${} AND client <> ''" if client else "client = ${}"
        filters = {
            named: client,
            "status = ${}": status,
            "kind = ${}": kind,
            "seq < (SELECT seq FROM afterward.tasks WHERE id = ${})": after,
        }
        chosen = {sql: value for sql, value in filters.items() if value is not None}
        conditions = [sql.format(number) for number, sql in enumerate(chosen, start=2)]
        where = " AND ".join(["TRUE", *conditions])
        async with self._session() as session:
            if after is not None and (await read_task(session, after)).client != client:
                raise TaskNotFound
            rows = await session.fetch(
                f"SELECT {TASK} FROM afterward.tasks WHERE {where} ORDER BY seq DESC LIMIT $1",
                limit,
                *chosen.values(),
            )
        return [as_task(row) for row in rows]

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
            if row is not None:
                return as_task(row)
            await read_task(session, task_id)  # raises TaskNotFound
            raise TaskHasStarted

    async def retry(self, task_id: str, now: float, writes: Writes) -> Task:
        async with self._transaction() as session:
            (taken,) = await keep_answers(session, [writes.answer])
            if taken is not None:
                raise taken
            row = await session.fetchrow(
                f"""
                UPDATE afterward.tasks
                SET status = 'queued', attempts = 0, crashes = 0, progress = NULL, result = NULL,
                    error = NULL, started_at = NULL, finished_at = NULL, updated_at = $2,
                    due_at = $2
                WHERE id = $1 AND status IN ('failed', 'cancelled') RETURNING {TASK}
                """,
                task_id,
                now,
            )
            if row is None:
                await read_task(session, task_id)  # raises TaskNotFound
                raise TaskNotGivenUp
            await enter_again(session, [task := as_task(row)])
        self._arrived.set()
        return task

    async def backlog(self) -> Backlog:
        async with self._session() as session:
            counts = await session.fetch(
                "SELECT status, sum(tasks)::bigint AS tasks FROM afterward.counts GROUP BY status"
            )
            oldest = await session.fetchval(
                "SELECT min(due_at) FROM afterward.tasks WHERE status IN ('queued', 'retrying')"
            )
        none = dict.fromkeys(Status, 0)
        return Backlog(none | {Status(row["status"]): row["tasks"] for row in counts}, oldest)

    async def check(self) -> None:
        async with self._session() as session:
            await session.execute("UPDATE afterward.counts SET tasks = tasks WHERE FALSE")

    # What a worker asks.

    async def claim(
        self, owner: str, *, limit: int, suspect: bool = True, now: float, lease: float
    ) -> list[Task]:
        claim = partial(self._claim, owner, now=now, lease=lease)
        # To look for a suspect is a round trip more: now and then, or where there is nothing else.
        looks = suspect and time.monotonic() >= self._look_at
        if looks:
            if found := await claim(entries.SUSPECT, limit=1):
                return found
            self._look_at = time.monotonic() + LOOK_SECONDS
        tasks = await claim(entries.TASK, limit=limit)
        if tasks or looks or not suspect:
            return tasks
        return await claim(entries.SUSPECT, limit=1)

    async def _claim(
        self, owner: str, entrypoint: Entrypoint, *, limit: int, now: float, lease: float
    ) -> list[Task]:
        while True:
            silence = lease + self._outages.recent(lease)
            async with self._session() as session:
                tasks, strange = await begin_attempts(
                    session, entrypoint, owner, limit=limit, silence=silence, now=now
                )
            self._held |= {task.id: task for task in tasks}
            try:
                back, dropped = await self._sort_out(strange, owner, now)
            except QueueUnavailable:  # what is claimed is to be run; the others come again
                return tasks
            if tasks or back or not dropped:
                return tasks + back

    async def _sort_out(
        self, strange: Sequence[int], owner: str, now: float
    ) -> tuple[list[Task], bool]:
        """Deal with entries whose tasks do not wait.

        Gives the tasks whose workers died, and whether entries were dropped that meant nothing.
        """
        if not strange:
            return [], False
        async with self._transaction() as session:
            rows = await lock_running(session, strange)
            if gone := set(strange) - {row["entry"] for row in rows}:
                await entries.drop(session, list(gone))
            # Its own are still its own: its heartbeat was late, no more. But not those which a
            # claim gave it whose answer got lost on the way: nobody works on these.
            dead = [row for row in rows if row["owner"] != owner or not self._holds(row)]
            return await take_back(session, dead, now) if dead else [], bool(gone)

    def _holds(self, row: Row) -> bool:
        held = self._held.get(row["id"])
        return held is not None and held.claims == row["claims"]

    async def extend(self, owner: str, *, now: float, lease: float) -> set[str]:  # noqa: ARG002 - the database's clock counts
        held = [task.id for task in self._held.values() if task.owner == owner]
        async with self._session() as session:
            rows = await session.fetch(
                """
                SELECT id, entry FROM afterward.tasks
                WHERE id = ANY($1) AND status = 'running' AND owner = $2
                """,
                held,
                owner,
            )
            await entries.beat(session, [row["entry"] for row in rows])
        return {row["id"] for row in rows}

    async def settle(self, task: Task, outcome: Outcome, now: float) -> Task | None:
        settled = await self._settle(Settlement(task, outcome, now))
        if self._held.get(task.id) == task:
            del self._held[task.id]
        if outcome.follow_ups.tasks:
            self._arrived.set()
        return settled

    async def _settle_all(self, settlements: Sequence[Settlement]) -> list[Task | None]:
        """Write how several attempts ended, in one transaction."""
        more = any(settlement.brings_more for settlement in settlements)
        async with self._transaction() if more else self._session() as session:
            settled = await end_attempts(session, settlements)
            if again := [task for task in settled.values() if task.status in WAITING]:
                await enter_again(session, again)
            follow_ups = [s.outcome.follow_ups for s in settlements if s.task.id in settled]
            await write_all(session, follow_ups)
            lost = [s for s in settlements if s.task.id not in settled]
            settled |= await settled_before(session, lost) if lost else {}
        return [settled.get(settlement.task.id) for settlement in settlements]

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
        return None if row is None else as_task(row)

    async def pull_forward(self, *, now: float, longest_wait: float) -> None:
        async with self._transaction() as session:
            await entries.pull_forward(session, longest_wait)
            await session.execute(
                """
                UPDATE afterward.tasks SET due_at = $1
                WHERE status IN ('queued', 'retrying') AND due_at > $2
                """,
                now,
                now + longest_wait,
            )

    async def wait_for_tasks(self, at_most: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._arrived.wait(), at_most)
        self._arrived.clear()

    def _entries_changed(self, payload: str) -> None:
        if json.loads(payload)["operation"] == "insert":
            self._arrived.set()

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
            await entries.prune(session, larger_than=LARGEST_LOG)
        return _affected(tasks) + _affected(answers)

    # Documents beside the tasks.

    async def read_record(self, collection: str, record_id: str, *, client: str | None) -> Record:
        whose = [] if client is None else [client]
        async with self._session() as session:
            row = await session.fetchrow(
                f"""
                SELECT {_RECORD} FROM afterward.records
                WHERE collection = $1 AND id = $2 {"AND client = $3" if whose else ""}
                """,
                collection,
                record_id,
                *whose,
            )
        if row is None:
            raise RecordNotFound
        return _record(row)

    async def list_records(
        self, collection: str, *, client: str, after: str | None, limit: int
    ) -> list[Record]:
        async with self._session() as session:
            rows = await session.fetch(
                f"""
                SELECT {_RECORD} FROM afterward.records
                WHERE collection = $1 AND client = $2 AND ($3::text IS NULL OR id < $3)
                ORDER BY id DESC LIMIT $4
                """,
                collection,
                client,
                after,
                limit,
            )
        return [_record(row) for row in rows]

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
        return _affected(done) == 1

    async def delete_record(self, record: Record) -> bool:
        async with self._session() as session:
            done = await session.execute(
                "DELETE FROM afterward.records WHERE collection = $1 AND client = $2 AND id = $3",
                record.collection,
                record.client,
                record.id,
            )
        return _affected(done) == 1

    # What other processes do.

    def tell(self, event: Event) -> None:
        self._grapevine.tell(event)

    def hear(self, *listeners: Listener) -> None:
        self._grapevine.hear(listeners)
        self._ear.listen(CHANNEL, self._grapevine.heard)

    async def _notify(self, payloads: Sequence[str]) -> bool:
        async with self._session() as session:
            return await self._ear.notify(session, CHANNEL, payloads)

    # Connections

    @contextlib.asynccontextmanager
    async def _session(self) -> AsyncIterator[Session]:
        """A connection; each statement on it is a transaction of its own."""
        with _troubles_translated(), self._outages.noticed():
            async with self._pool.acquire(timeout=5) as session:
                yield session

    @contextlib.asynccontextmanager
    async def _transaction(self) -> AsyncIterator[Session]:
        """A connection in a transaction, which is committed at the end."""
        async with self._session() as session, session.transaction():
            yield session


async def _nothing_to_reset(_: Session) -> None:
    """Sessions are left as they were found, so that a round trip can be saved."""


@contextlib.contextmanager
def _troubles_translated() -> Iterator[None]:
    try:
        yield
    except asyncpg.IntegrityConstraintViolationError:
        raise  # not the database's fault, and trying again would not help
    except asyncpg.DiskFullError as error:
        raise QueueFull from error
    except Troubles as error:
        raise QueueUnavailable from error


def _record(row: Row) -> Record:
    return Record(**{**row, "body": json.loads(row["body"])})


def _affected(done: str) -> int:
    """How many rows a statement changed; its answer is "DELETE 3", for example."""
    return int(done.rpartition(" ")[2])
