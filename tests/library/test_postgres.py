"""The PostgreSQL engine, beyond the contract: connections, shared transactions, events, locks."""

import asyncio
import contextlib
import gc
import json
import time
import weakref
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import Any
from unittest.mock import Mock

import asyncpg
import pytest
from structlog.testing import capture_logs

from afterward import worker
from afterward.engines.postgres import connections as postgres_connections
from afterward.engines.postgres import engine as postgres_engine
from afterward.engines.postgres import event_relay as postgres_events
from afterward.engines.postgres import listener as postgres_listener
from afterward.engines.postgres import search as postgres_search
from afterward.engines.postgres import statements as postgres_statements
from afterward.engines.postgres.engine import Postgres as Engine
from afterward.engines.postgres.event_relay import EventRelay
from afterward.engines.postgres.outages import Outages
from afterward.errors import CommitUnknown, DiskFull, KeyTaken, QueueUnavailable, TaskNotFound
from afterward.events import Event, EventType
from afterward.filter import TaskFilter
from afterward.retry import WORKER_DIED
from afterward.task import Answer, Claim, Outcome, Record, Status, Writes
from afterward.unit_of_work import Context
from tests.library.support import (
    DAY,
    KINDS,
    LEASE,
    NOW,
    EventRecorder,
    a_task,
    claim,
    claim_all,
    claim_one,
    in_batch,
    promise,
    put,
    queue_of,
    working,
)
from tests.support.postgres import Postgres, Sql, with_tables

pytestmark = pytest.mark.anyio

LEASES_EXPIRE = "UPDATE afterward.tasks SET lease_until = now() - interval '1 hour'"


@asynccontextmanager
async def opened(url: str) -> AsyncIterator[Engine]:
    engine = Engine(url)
    await engine.start()
    yield engine
    await engine.stop()


@pytest.fixture
async def engine(database_url: str) -> AsyncIterator[Engine]:
    """An engine that uses PostgreSQL's real clock, without the time machine."""
    async with opened(database_url) as engine:
        yield engine


@asynccontextmanager
async def connected(url: str) -> AsyncIterator["asyncpg.Connection[Any]"]:
    """Connect to the database beside the engine."""
    connection = await asyncpg.connect(url)
    yield connection
    await connection.close()


async def eventually(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not true():  # noqa: ASYNC110 - the awaited change happens in another process
            await asyncio.sleep(0.01)


# Outages


@pytest.mark.thorough
async def test_a_full_queue_of_notifications_is_an_outage_that_ends() -> None:
    """Each put notifies the workers. So a session that listens and does not read stops all puts.

    A task that has done its work must not fail because its follow-up cannot be put.
    """
    ran: list[str] = []

    async def greet(context: Context[None]) -> None:
        ran.append("greet")

    async def work(context: Context[None]) -> None:
        ran.append("work")
        context.durable_tasks.add_task(greet)

    with Postgres(max_notify_queue_pages=64) as postgres:
        url = await asyncio.to_thread(with_tables, postgres)
        async with opened(url) as engine, connected(url) as stuck, connected(url) as other:
            queue = queue_of(engine, work, greet, now=time.time)
            await promise(queue, work)
            await stuck.execute("LISTEN anything")
            await stuck.execute("BEGIN; SELECT 1")
            with contextlib.suppress(asyncpg.ProgramLimitExceededError):
                while True:
                    await other.execute(
                        "SELECT pg_notify('anything', repeat('x', 7000) || random()) "
                        "FROM generate_series(1, 5)"
                    )
            with pytest.raises(QueueUnavailable):
                await promise(queue, greet)
            async with working(queue):
                await eventually(lambda: ran == ["work"])
                await asyncio.sleep(1.5)  # longer than the tries after which an outcome is given up
                await stuck.close()
                # PostgreSQL frees the pages of the queue when it is asked how full it is.
                await other.execute("SELECT pg_notification_queue_usage()")
                async with asyncio.timeout(60):
                    while ran != ["work", "greet"]:  # noqa: ASYNC110 - the worker changes it
                        await asyncio.sleep(0.05)


# Transactions


async def test_puts_that_arrive_together_share_a_transaction(engine: Engine, sql: Sql) -> None:
    await asyncio.gather(*(put(engine, a_task()) for _ in range(50)))
    assert sql("SELECT count(*), count(DISTINCT xmin::text) FROM afterward.tasks") == "50|1"


async def test_tasks_that_need_three_statements_are_put_in_order_in_one_transaction(
    engine: Engine, sql: Sql
) -> None:
    tasks = [a_task() for _ in range(2 * postgres_statements.INSERT_AT_ONCE + 1)]
    await put(engine, *tasks)
    assert sql("SELECT count(DISTINCT xmin::text) FROM afterward.tasks") == "1"
    assert sql("SELECT string_agg(id, ' ' ORDER BY seq) FROM afterward.tasks") == " ".join(
        task.id for task in tasks
    )


async def test_outcomes_that_arrive_together_share_a_transaction(engine: Engine, sql: Sql) -> None:
    await put(engine, *(a_task() for _ in range(20)))
    claimed = await claim_all(engine)
    await asyncio.gather(*(engine.settle(task, Outcome(Status.SUCCEEDED), NOW) for task in claimed))
    assert sql("SELECT count(*), count(DISTINCT xmin::text) FROM afterward.tasks") == "20|1"


async def test_a_put_with_a_duplicate_id_does_not_affect_other_puts(engine: Engine) -> None:
    task, other = a_task(), a_task()
    await put(engine, task)
    again, _ = await asyncio.gather(put(engine, task), put(engine, other), return_exceptions=True)
    assert isinstance(again, asyncpg.UniqueViolationError)
    assert await engine.get(other.id) == other


async def test_writes_of_the_same_record_in_one_transaction_keep_their_order(
    engine: Engine,
) -> None:
    writes = [Writes(records=(Record("saved", "", "ada", {"size": n}, NOW),)) for n in range(9)]
    await asyncio.gather(*map(engine.put, writes))
    assert (await engine.read_record("saved", "ada", client="")).body == {"size": 8}


async def test_two_processes_store_an_idempotency_key_once(
    engine: Engine, database_url: str
) -> None:
    """The process that comes second gets the answer that the first has stored."""
    async with opened(database_url) as other:
        writes = [Writes((a_task(),), answer=Answer("key", "f", "{}", "/", NOW)) for _ in range(40)]
        engines = [engine, other] * 20
        outcomes = await asyncio.gather(
            *(engine.put(one) for engine, one in zip(engines, writes, strict=True)),
            return_exceptions=True,
        )
    taken = [outcome for outcome in outcomes if isinstance(outcome, KeyTaken)]
    assert len(taken) == 39
    assert sum((await engine.backlog()).counts.values()) == 1


async def test_claims_and_settlements_side_by_side_never_deadlock(
    engine: Engine, database_url: str, sql: Sql
) -> None:
    """With leases of 0 s, workers constantly re-queue each other's tasks, and settle them late."""
    await put(engine, *(a_task(max_attempts=1000) for _ in range(20)))
    deadlocks = "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"
    before = sql(deadlocks)

    async def work(engine: Engine, owner: str) -> None:
        for _ in range(15):
            claimed = await engine.claim(owner, kinds=KINDS, limit=20, now=NOW, lease=0.0)
            tasks = claimed.running + claimed.recovered
            await asyncio.gather(
                *(engine.settle(t, Outcome(Status.QUEUED, due_at=NOW), NOW) for t in tasks)
            )

    async with opened(database_url) as other:
        await asyncio.gather(
            *(work(e, f"{n}") for e in (engine, other) for n in (id(e), id(e) + 1))
        )
    assert sql(deadlocks) == before


# Workers


async def test_a_worker_with_a_late_heartbeat_keeps_its_tasks(engine: Engine, sql: Sql) -> None:
    """It keeps them unless a second worker has re-queued them in the meantime."""
    await put(engine, a_task())
    task = await claim_one(engine)
    sql(LEASES_EXPIRE)
    assert await claim(engine) == Claim()
    assert await engine.get(task.id) == task


async def test_a_task_is_requeued_if_the_answer_to_its_claim_was_lost(
    engine: Engine, database_url: str, sql: Sql
) -> None:
    """The worker does not know of the task, so its heartbeat does not extend the task's lease."""
    await put(engine, task := a_task())
    async with opened(database_url) as stands_for_the_lost_answer:
        await claim(stands_for_the_lost_answer)
    assert await engine.extend("worker-1", now=NOW, lease=LEASE) == set()
    sql(LEASES_EXPIRE)
    (taken,) = (await claim(engine)).recovered
    assert (taken.id, taken.status, taken.error) == (task.id, Status.RETRYING, WORKER_DIED)
    assert [again.id for again in await claim_all(engine)] == [task.id]


async def test_a_worker_finds_a_new_task_without_a_notification(
    engine: Engine, sql: Sql, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next poll finds it. PostgreSQL drops notifications while the connection is broken."""
    monkeypatch.setattr(worker, "POLL_SECONDS", 0.1)

    async def greet(context: Context[None]) -> None:
        pass

    queue = queue_of(engine, greet, now=time.time)
    recorder = EventRecorder(queue)
    async with working(queue):
        await asyncio.sleep(0.2)
        await engine._listener.stop()
        sql(
            "INSERT INTO afterward.tasks "
            "(id, kind, arguments, status, created_at, updated_at, due_at, ready_at) "
            """VALUES ('1', 'greet', '{"args":[],"kwargs":{}}', 'queued', 0, 0, 0, now())"""
        )
        await recorder.until(EventType.SUCCEEDED)


async def test_a_crashed_task_runs_before_new_tasks(
    engine: Engine, database_url: str, sql: Sql
) -> None:
    """There may always be new tasks, so it would wait for ever otherwise."""
    async with opened(database_url) as another:
        await put(engine, task := a_task())
        await claim(another, "worker-2")
        sql(LEASES_EXPIRE)
        (suspect,) = (await claim(engine)).recovered
        assert (suspect.id, suspect.status) == (task.id, Status.RETRYING)
    await put(engine, *(a_task() for _ in range(1_000)))
    assert (await claim_one(engine)).id == suspect.id


async def test_a_settlement_can_be_repeated_if_its_answer_was_lost(engine: Engine) -> None:
    await put(engine, a_task())
    task = await claim_one(engine)
    settled = await engine.settle(task, Outcome(Status.SUCCEEDED, result="1"), NOW + 1)
    assert settled is not None
    assert await engine.settle(task, Outcome(Status.SUCCEEDED, result="1"), NOW + 1) == settled
    assert await engine.settle(task, Outcome(Status.SUCCEEDED, result="1"), NOW + 2) is None


# Cleaning up


async def test_a_purge_adds_up_the_counts_by_status(engine: Engine, sql: Sql) -> None:
    for _ in range(5):
        await put(engine, a_task())
    await claim(engine, limit=2)
    before = (await engine.backlog()).counts
    await engine.purge(finished_before=0, failed_before=0, answered_before=0, limit=1)
    assert sql("SELECT count(*) FROM afterward.counts") == "2"
    assert (await engine.backlog()).counts == before


# A backlog

ROWS_READ = """
SELECT (SELECT sum(idx_tup_read) FROM pg_stat_user_indexes WHERE schemaname = 'afterward')
     + (SELECT sum(seq_tup_read) FROM pg_stat_user_tables WHERE schemaname = 'afterward')
"""


async def test_no_operation_reads_more_rows_than_it_needs(postgres: Postgres) -> None:
    """This holds even with a backlog so new that the planner's statistics do not include it."""
    database_url = await asyncio.to_thread(with_tables, postgres)  # without the rows of other tests
    sql = partial(postgres.sql, url=database_url)
    sql(
        "INSERT INTO afterward.tasks "
        "(id, kind, arguments, status, created_at, updated_at, due_at, ready_at) "
        "SELECT n::text, (array['left_out', 'send_email'])[1 + n % 2], '{}', 'queued', "
        f"{NOW}, {NOW}, {NOW} + n % 2 * 3600, now() + n % 2 * interval '1 hour' "
        "FROM generate_series(1, 100000) AS n"
    )
    async with opened(database_url) as engine:
        await put(engine, waiting := a_task(due_at=NOW + 5), *(a_task() for _ in range(2000)))
        await engine.put(Writes(in_batch("batch", a_task(due_at=NOW + 5), a_task(due_at=NOW + 5))))
    sql("SELECT pg_stat_reset()")
    async with opened(database_url) as engine:  # its end updates the statistics
        tasks = (await claim(engine, limit=10)).running
        await asyncio.gather(
            *(engine.settle(t, Outcome(Status.RETRYING, due_at=NOW + 9), NOW) for t in tasks)
        )
        await engine.cancel(waiting.id, NOW)
        await claim(engine, limit=10)
        claimed = await engine.claim("worker-2", kinds=KINDS, limit=9, now=NOW, lease=0.0)
        assert claimed.running
        await engine.extend("worker-1", now=NOW, lease=LEASE)
        await engine.pull_forward(kinds=KINDS, now=NOW, longest_wait=DAY, limit=10)
        await engine.purge(finished_before=NOW, failed_before=NOW, answered_before=NOW, limit=10)
        await engine.backlog()
        await engine.count_batch("batch", client="")
        for statuses in ((), (Status.FAILED,)):
            wanted = TaskFilter(statuses=statuses)
            await engine.list_tasks(wanted, after=tasks[0].id, limit=10)
        await engine.list_changed("", since=NOW, now=NOW, limit=10)
    await eventually(lambda: sql(ROWS_READ) not in {"", "0"})
    assert int(sql(ROWS_READ)) < 1000


# A database that refuses, or goes away


async def test_a_full_disk_raises_queue_full(engine: Engine, sql: Sql) -> None:
    """A trigger raises PostgreSQL's own error for it."""
    sql(
        "CREATE FUNCTION no_room() RETURNS trigger LANGUAGE plpgsql AS "
        "$$ BEGIN RAISE EXCEPTION 'no room' USING ERRCODE = 'disk_full'; END $$;"
        "CREATE TRIGGER no_room BEFORE INSERT ON afterward.tasks EXECUTE FUNCTION no_room()"
    )
    try:
        with pytest.raises(DiskFull):
            await put(engine, task := a_task())
    finally:
        sql("DROP TRIGGER no_room ON afterward.tasks; DROP FUNCTION no_room()")
    with pytest.raises(TaskNotFound):
        await engine.get(task.id)


@pytest.mark.parametrize(
    ("answer", "raised"),
    [(None, CommitUnknown), (Answer("key", "f", "{}", "/", NOW), QueueUnavailable)],
    ids=["a statement of its own", "a statement in a transaction"],
)
async def test_the_outcome_of_a_commit_is_unknown_if_its_connection_breaks(
    engine: Engine,
    database_url: str,
    sql: Sql,
    answer: Answer | None,
    raised: type[QueueUnavailable],
) -> None:
    """If it breaks before the COMMIT of a transaction, it is certain that nothing was written."""
    other = await asyncpg.connect(database_url)
    async with other.transaction():
        await other.execute("LOCK TABLE afterward.tasks")
        putting = asyncio.create_task(engine.put(Writes((a_task(),), answer=answer)))
        waiting = (
            "FROM pg_stat_activity WHERE application_name = 'afterward' "
            "AND datname = current_database() AND wait_event_type = 'Lock'"
        )
        await eventually(lambda: sql(f"SELECT count(*) {waiting}") == "1")
        sql(f"SELECT pg_terminate_backend(pid) {waiting}")
        with pytest.raises(QueueUnavailable) as error:
            await putting
    await other.close()
    assert error.type is raised


async def test_a_read_that_loses_its_connection_is_no_commit_of_unknown_outcome(
    engine: Engine, database_url: str, sql: Sql
) -> None:
    other = await asyncpg.connect(database_url)
    async with other.transaction():
        await other.execute("LOCK TABLE afterward.tasks")
        reading = asyncio.create_task(engine.get("1"))
        waiting = (
            "FROM pg_stat_activity WHERE application_name = 'afterward' "
            "AND datname = current_database() AND wait_event_type = 'Lock'"
        )
        await eventually(lambda: sql(f"SELECT count(*) {waiting}") == "1")
        sql(f"SELECT pg_terminate_backend(pid) {waiting}")
        with pytest.raises(QueueUnavailable) as error:
            await reading
    await other.close()
    assert error.type is QueueUnavailable


async def test_a_misuse_of_the_driver_is_no_outage(engine: Engine) -> None:
    """It is a bug, so waiting does not help, and the developer must see it."""
    with pytest.raises(asyncpg.InterfaceError, match="expects 0 arguments"):
        async with engine._pool.session() as session:
            await session.fetch("SELECT 1", 2)
    with pytest.raises(asyncpg.InterfaceError, match="another operation is in progress"):
        async with engine._pool.transaction() as session:
            await asyncio.gather(session.fetch("SELECT 1"), session.fetch("SELECT 2"))
    assert engine._pool.outages.recent_seconds(LEASE) == 0


async def test_the_use_of_a_connection_that_has_broken_is_an_outage(engine: Engine) -> None:
    async def use_a_broken_connection() -> None:
        async with engine._pool.session() as session:
            session.terminate()
            await session.fetch("SELECT 1")

    with pytest.raises(QueueUnavailable):
        await use_a_broken_connection()


async def test_a_put_without_a_connection_has_a_known_outcome(engine: Engine) -> None:
    engine._pool._opened().terminate()
    with pytest.raises(QueueUnavailable) as error:
        await put(engine, a_task())
    assert error.type is QueueUnavailable


async def test_a_put_that_the_server_refuses_has_a_known_outcome(engine: Engine, sql: Sql) -> None:
    sql(
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS "
        "$$ BEGIN RAISE EXCEPTION 'no' USING ERRCODE = 'query_canceled'; END $$;"
        "CREATE TRIGGER refuse BEFORE INSERT ON afterward.tasks EXECUTE FUNCTION refuse()"
    )
    try:
        with pytest.raises(QueueUnavailable) as error:
            await put(engine, a_task())
    finally:
        sql("DROP TRIGGER refuse ON afterward.tasks; DROP FUNCTION refuse()")
    assert error.type is QueueUnavailable


async def test_the_check_refuses_a_read_only_database(
    engine: Engine, database_url: str, postgres: Postgres
) -> None:
    """A standby is read-only if the service was switched to it before its promotion."""
    name = database_url.rpartition("/")[2]
    postgres.sql(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
    try:
        async with opened(database_url) as reader:
            with pytest.raises(QueueUnavailable):
                await reader.check()
    finally:
        postgres.sql(f"ALTER DATABASE {name} RESET ALL")
    await engine.check()


async def test_broken_connections_are_replaced(
    engine: Engine, sql: Sql, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This includes the connection that listens for new tasks."""
    monkeypatch.setattr(postgres_listener, "PING_SECONDS", 0.05)
    monkeypatch.setattr(postgres_listener, "PAUSE_SECONDS", 0.05)
    await put(engine, a_task())
    break_them = (
        "SELECT count(pg_terminate_backend(pid)) > 0 FROM pg_stat_activity "
        "WHERE application_name = 'afterward' AND datname = current_database()"
    )
    assert sql(break_them) == "t"
    await eventually(lambda: sql(break_them.replace("pg_terminate_backend(pid)", "pid")) == "t")
    async with asyncio.timeout(5):
        while True:
            try:
                await put(engine, a_task())
            except QueueUnavailable:
                continue
            break
    assert len(await claim_all(engine)) == 2


async def test_the_length_of_an_outage_is_added_to_the_leases() -> None:
    """During an outage no worker can write a heartbeat, so none is taken for dead because of it."""
    outages = Outages(QueueUnavailable)
    with outages.watch():
        pass
    assert outages.recent_seconds(LEASE) == 0
    with pytest.raises(QueueUnavailable), outages.watch():
        raise QueueUnavailable
    time.sleep(0.1)  # noqa: ASYNC251 - the database is away meanwhile
    assert outages.recent_seconds(LEASE) >= 0.1
    with outages.watch():
        pass
    assert LEASE > outages.recent_seconds(LEASE) >= 0.1
    assert outages.recent_seconds(0) == 0


async def test_a_stop_does_not_wait_for_ever_for_a_connection_in_use(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgres_connections, "CLOSE_SECONDS", 0.1)
    async with asyncio.timeout(5):
        async with opened(database_url) as engine:
            await engine._pool._opened().acquire()


@pytest.mark.parametrize("step", ["check", "open"])
@pytest.mark.parametrize("ends_by", ["an error", "a cancellation"])
async def test_a_start_that_does_not_finish_closes_its_connections(
    database_url: str, sql: Sql, monkeypatch: pytest.MonkeyPatch, step: str, ends_by: str
) -> None:
    reached = asyncio.Event()

    async def fail(*_: object) -> None:
        reached.set()
        if ends_by == "an error":
            raise LookupError
        await asyncio.Event().wait()

    engine = Engine(database_url)
    if step == "check":
        monkeypatch.setattr(postgres_engine, "check", fail)
    else:
        monkeypatch.setattr(postgres_connections.Pool, "open", fail)
    starting = asyncio.create_task(engine.start())
    await reached.wait()
    starting.cancel()
    with pytest.raises((LookupError, asyncio.CancelledError)):
        await starting
    connections = (
        "SELECT count(*) FROM pg_stat_activity "
        "WHERE application_name = 'afterward' AND datname = current_database()"
    )
    await eventually(lambda: sql(connections) == "0")


# Events of other processes


@asynccontextmanager
async def another(url: str, heard: list[Event]) -> AsyncIterator[Engine]:
    """Start an engine as in a second process; `heard` collects the events of other engines."""
    async with opened(url) as engine:
        engine.subscribe(heard.append)
        await eventually(lambda: "afterward_events" in engine._listener._listening)
        yield engine


async def test_an_event_reaches_other_processes(engine: Engine, database_url: str) -> None:
    """It carries the whole task except its arguments. The sender does not receive it."""
    heard: list[Event] = []
    own: list[Event] = []
    engine.subscribe(own.append)
    async with another(database_url, heard):
        task = a_task(arguments='{"args":[],"kwargs":{"password":"secret"}}', result='"done"')
        engine.publish(Event(EventType.STARTED, task))
        engine.publish(Event(EventType.LOST, task))
        engine.publish(Event(EventType.SUCCEEDED, task, seconds=0.5, exception=ValueError()))
        await eventually(lambda: len(heard) == 2)
    bare = replace(task, arguments="")
    assert heard == [Event(EventType.STARTED, bare), Event(EventType.SUCCEEDED, bare, seconds=0.5)]
    assert own == []


async def test_subscribers_are_added_and_stay_after_a_restart(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgres_events, "_SILENCE_SECONDS", 0.05)
    heard: list[Event] = []
    gaps: list[float] = []
    engine = Engine(database_url)
    for _ in range(2):
        engine.subscribe(heard.append)
        engine.subscribe_to_gaps(gaps.append)
    for _ in range(2):
        await engine.start()
        await eventually(lambda: "afterward_events" in engine._listener._listening)
        async with opened(database_url) as other:
            other.publish(Event(EventType.STARTED, a_task()))
            await eventually(lambda: len(heard) == 2)
        await eventually(lambda: len(gaps) == 2)
        heard.clear()
        gaps.clear()
        await engine.stop()


async def test_the_gap_after_a_restart_begins_before_the_stop(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgres_events, "_SILENCE_SECONDS", 0.05)
    gaps: list[float] = []
    engine = Engine(database_url)
    engine.subscribe(Mock())
    engine.subscribe_to_gaps(gaps.append)
    stops = []

    def has_gaps(number: int) -> bool:
        return len(gaps) == number

    for gap in (1, 2):
        await engine.start()
        await eventually(partial(has_gaps, gap))
        stops.append(time.time())
        await engine.stop()
    assert gaps[1] <= stops[0]


async def test_a_careless_subscriber_and_an_unknown_event_harm_no_other(engine: Engine) -> None:
    """A process of a newer version may send events that this one does not know."""

    def careless(_: object) -> None:
        raise LookupError

    heard: list[Event] = []
    gaps: list[float] = []
    engine.subscribe(careless, heard.append)
    engine.subscribe_to_gaps(careless, gaps.append)
    tasks = [a_task(arguments="") for _ in range(4)]
    (payload,) = await payloads_of(*(Event(EventType.STARTED, task) for task in tasks))
    sender, first, second, third, fourth = json.loads(payload)
    second[0] = "paused"
    third[2]["priority"] = 7
    engine._event_relay.receive(json.dumps([sender, first, second, third, fourth]))
    assert [event.task for event in heard] == [tasks[0], tasks[3]]
    engine._event_relay._tell_of_gap_now(NOW)
    assert gaps == [NOW]


async def test_a_gap_in_the_events_is_told_when_they_arrive_again(
    engine: Engine, database_url: str, sql: Sql, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is one at the start, and one when the connection breaks. Tasks show what was lost."""
    monkeypatch.setattr(postgres_events, "_SILENCE_SECONDS", 0.2)
    monkeypatch.setattr(postgres_listener, "PAUSE_SECONDS", 0.05)
    heard: list[Event] = []
    gaps: list[float] = []
    began = time.time()
    async with another(database_url, heard) as other:
        other.subscribe_to_gaps(gaps.append)
        await eventually(lambda: len(gaps) == 1)
        engine.publish(Event(EventType.STARTED, a_task()))
        await eventually(lambda: len(heard) == 1)
        broken_at = time.time()
        sql(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE query LIKE 'LISTEN%' OR query = 'SELECT 1'"
        )
        await eventually(lambda: len(gaps) == 2)
        engine.publish(Event(EventType.STARTED, a_task()))
        await eventually(lambda: len(heard) == 2)
    assert began <= gaps[0] <= gaps[1] <= broken_at


async def test_two_gaps_that_follow_each_other_are_told_once(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgres_events, "_SILENCE_SECONDS", 0.05)
    relay, gaps = engine._event_relay, list[float]()
    engine.subscribe_to_gaps(gaps.append)
    relay.tell_of_gap(5.0)
    relay.tell_of_gap(7.0)
    await eventually(lambda: len(gaps) == 1)
    await asyncio.sleep(0.1)
    assert gaps == [5.0]


async def test_a_task_that_is_too_long_for_a_notification_is_read_from_its_row(
    engine: Engine, database_url: str
) -> None:
    heard: list[Event] = []
    await put(engine, a_task())
    task = await claim_one(engine)
    settled = await engine.settle(task, Outcome(Status.SUCCEEDED, result=f'"{"x" * 9000}"'), NOW)
    assert settled is not None
    async with another(database_url, heard):
        engine.publish(Event(EventType.SUCCEEDED, settled, seconds=0.5))
        engine.publish(Event(EventType.SUCCEEDED, replace(settled, id="removed meanwhile")))
        engine.publish(Event(EventType.SUCCEEDED, a_task()))
        await eventually(lambda: len(heard) == 2)
    assert Event(EventType.SUCCEEDED, settled, seconds=0.5) in heard


async def test_searches_leave_connections_for_claims_and_commits(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A count of a million tasks takes long, and clients may ask for many at once."""
    has_ended = asyncio.Event()

    async def count_slowly(*_: object) -> int:
        await has_ended.wait()
        return 7

    monkeypatch.setattr(postgres_search, "count_tasks", count_slowly)
    counts = [asyncio.create_task(engine.count_tasks(TaskFilter())) for _ in range(9)]
    await asyncio.sleep(0.05)
    async with asyncio.timeout(2):
        await put(engine, a_task())
        await claim_one(engine)
    monkeypatch.setattr(postgres_connections, "STATEMENT_SECONDS", 0.01)
    with pytest.raises(QueueUnavailable):
        await engine.count_tasks(TaskFilter())
    has_ended.set()
    assert await asyncio.gather(*counts) == [7] * 9


async def test_an_event_that_cannot_be_sent_is_dropped(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Events between processes are a courtesy."""

    async def refuse(*_: object) -> None:
        raise QueueUnavailable

    monkeypatch.setattr(engine._event_relay, "_notify", refuse)
    engine.publish(Event(EventType.STARTED, a_task()))
    await engine._event_relay.finish()
    assert not engine._event_relay._unsent


async def payloads_of(*events: Event) -> list[str]:
    """Return the payloads in which these events are sent."""
    sent: list[str] = []

    async def notify(payloads: Sequence[str]) -> bool:
        sent.extend(payloads)
        return True

    relay = EventRelay(notify, Mock())
    for event in events:
        relay.publish(event)
    await relay.finish()
    return sent


class SlowChannel:
    """Stands for a database that takes some time to send notifications."""

    def __init__(self) -> None:
        self.is_free = asyncio.Event()
        self.at_once = self.most_at_once = 0
        self.sent: list[str] = []

    async def notify(self, payloads: Sequence[str]) -> bool:
        """Send the payloads once the channel is free."""
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        await self.is_free.wait()
        self.at_once -= 1
        self.sent += [facts["id"] for p in payloads for _, _, facts in json.loads(p)[1:]]
        return True


async def test_events_for_a_slow_database_are_sent_one_after_the_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """So they keep their order, and leave connections for claims and commits."""
    monkeypatch.setattr(postgres_events, "_GATHER_SECONDS", 0.0)
    channel = SlowChannel()
    relay = EventRelay(channel.notify, Mock())
    tasks = [a_task() for _ in range(5)]
    for task in tasks:
        relay.publish(Event(EventType.STARTED, task))
        await asyncio.sleep(0.01)
    channel.is_free.set()
    await relay.finish()
    assert channel.sent == [task.id for task in tasks]
    assert channel.most_at_once == 1
    relay.publish(Event(EventType.STARTED, tasks[0]))
    await relay.finish()
    assert channel.sent[5:] == [tasks[0].id]


async def test_the_oldest_events_are_dropped_when_too_many_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(postgres_events, "_MOST_UNSENT", 3)
    channel = SlowChannel()
    relay = EventRelay(channel.notify, Mock())
    tasks = [a_task() for _ in range(6)]
    with capture_logs() as lines:
        for task in tasks:
            relay.publish(Event(EventType.STARTED, task))
    assert [line["log_level"] for line in lines] == ["warning"]
    channel.is_free.set()
    await relay.finish()
    assert channel.sent == [task.id for task in tasks[3:]]


async def test_an_event_that_has_no_json_form_loses_only_itself(engine: Engine) -> None:
    tasks = [a_task(), a_task(progress=float("nan")), a_task()]
    events = [Event(EventType.PROGRESSED, task) for task in tasks]
    (payload,) = await payloads_of(*events)
    assert [facts["id"] for _, _, facts in json.loads(payload)[1:]] == [tasks[0].id, tasks[2].id]


async def test_an_event_that_waits_to_be_sent_holds_neither_its_result_nor_its_error() -> None:
    """The traceback of an error refers to the local variables of the task's function."""

    class Bug(Exception):
        pass

    relay = EventRelay(SlowChannel().notify, Mock())
    error = Bug()
    task = a_task(result='"large"' * 10_000)
    relay.publish(Event(EventType.FAILED, task, 0.1, error))
    held = weakref.ref(error)
    del error
    gc.collect()
    assert held() is None
    assert sum(map(len, relay._unsent)) < 100


async def test_events_that_wait_for_the_database_are_sent_in_portions() -> None:
    channel, portions = SlowChannel(), []

    async def notify(payloads: Sequence[str]) -> bool:
        portions.append(len(payloads))
        return await channel.notify(payloads)

    relay = EventRelay(notify, Mock())
    tasks = [a_task() for _ in range(1200)]
    for task in tasks:
        relay.publish(Event(EventType.STARTED, task))
    channel.is_free.set()
    await relay.finish()
    assert channel.sent == [task.id for task in tasks]
    assert len(portions) == 3


async def test_a_task_with_a_long_history_fits_into_a_notification(engine: Engine) -> None:
    """During an outage, the other processes would otherwise read the row of each retry."""
    event = Event(EventType.RETRYING, a_task(history=f'["{"x" * 9000}"]'))
    (payload,) = await payloads_of(event)
    (_, _, facts) = json.loads(payload)[1]
    assert facts["kind"] == event.task.kind
    assert "history" not in facts


async def test_a_notification_is_shorter_than_postgresql_s_limit(engine: Engine) -> None:
    """PostgreSQL refuses a payload of 8,000 bytes or more."""
    for size in range(7000, 8200, 7):
        event = Event(EventType.STARTED, a_task(error=f'"{"x" * size}"'))
        (payload,) = await payloads_of(event)
        assert len(payload) <= postgres_events._MAX_BYTES < 8000
        assert json.loads(payload)


async def test_a_notification_holds_as_many_events_as_fit(engine: Engine) -> None:
    """Their order stays, and each payload is within the limit."""
    lengths = [7 * n % 900 for n in range(200)]
    events = [Event(EventType.STARTED, a_task(error="x" * length)) for length in lengths]
    payloads = await payloads_of(*events)
    assert max(map(len, payloads)) <= postgres_events._MAX_BYTES
    assert len(payloads) < len(events) / 10
    told = [event for payload in payloads for event in json.loads(payload)[1:]]
    assert [facts["id"] for _, _, facts in told] == [event.task.id for event in events]


async def test_no_notification_is_sent_while_no_other_process_listens(
    engine: Engine, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine asks from time to time whether one does; its own listener does not count."""
    monkeypatch.setattr(postgres_events, "_SILENCE_SECONDS", 0.2)
    engine.subscribe(lambda _: None)
    await eventually(lambda: "afterward_events" in engine._listener._listening)
    engine.publish(Event(EventType.STARTED, a_task()))
    await engine._event_relay.finish()
    engine.publish(Event(EventType.STARTED, a_task()))
    assert not engine._event_relay._unsent

    heard: list[Event] = []
    async with another(database_url, heard):
        await asyncio.sleep(0.2)
        engine.publish(Event(EventType.STARTED, a_task()))
        await eventually(lambda: len(heard) == 1)
    await asyncio.sleep(0.05)
    engine.publish(Event(EventType.STARTED, a_task()))
    await engine._event_relay.finish()
    assert len(heard) == 1
