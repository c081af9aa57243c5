"""A task that is added in the caller's own transaction exists exactly if the caller's rows do."""

import asyncio
import contextlib
import json
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import asyncpg
import pytest
from asyncpg.pool import PoolConnectionProxy

from afterward import worker as worker_module
from afterward.engines import open_engine
from afterward.errors import BacklogFull
from afterward.events import EventType
from afterward.queue import Queue
from afterward.registry import Registry
from afterward.retry import RetryPolicy
from afterward.task import Status, Task
from afterward.unit_of_work import Context
from afterward.worker import Worker
from tests.library.support import EventRecorder, opened, promise, working
from tests.support.postgres import Postgres, Sql

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession

pytestmark = pytest.mark.anyio


class WentWrongError(Exception):
    """The caller's own reason to roll back."""


async def greet(_: Context[None], *, name: str) -> None:
    """Greet somebody."""


async def connect(_: Context[None], *, connection: str, function: str) -> None:
    """Has arguments that are named like those of add_task_in."""


async def remind(_: Context[None], *, at: datetime) -> datetime:
    """Has an argument that is not JSON by itself."""
    return at


async def fail(_: Context[None]) -> None:
    """Not in the registry."""


@pytest.fixture
async def queue(database_url: str, sql: Sql) -> AsyncIterator[Queue[None]]:
    """A queue on PostgreSQL, with a table of the caller's in the same database."""
    sql("DROP SCHEMA IF EXISTS shop CASCADE")
    sql("CREATE SCHEMA shop; CREATE TABLE shop.orders (name text)")
    async with queue_on(database_url) as queue:
        yield queue


@asynccontextmanager
async def queue_on(url: str, **settings: Any) -> AsyncIterator[Queue[None]]:
    engine = open_engine(url)
    await engine.start()
    yield Queue(engine, Registry(greet, connect, remind), RetryPolicy(), **settings)
    await engine.stop()


def orders_and_tasks(sql: Sql) -> tuple[list[str], list[str]]:
    """Read the names in the caller's rows and in the tasks, as another connection sees them."""
    orders = sql("SELECT name FROM shop.orders ORDER BY name")
    tasks = sql("SELECT arguments::json->'kwargs'->>'name' FROM afterward.tasks ORDER BY id")
    return orders.splitlines(), tasks.splitlines()


# The kinds of connection. `given` is the object that is handed to `add_task_in`.


class Asyncpg:
    """A connection of asyncpg."""

    def __init__(self, given: "asyncpg.Connection[Any] | PoolConnectionProxy[Any]") -> None:
        self.given: Any = given

    def transaction(self) -> AbstractAsyncContextManager[Any]:
        """Begin; the end of the block commits, and an error rolls back."""
        return self.given.transaction()  # type: ignore[no-any-return]

    savepoint = transaction

    async def execute(self, statement: str) -> None:
        """Run a statement of the caller's."""
        await self.given.execute(statement)

    async def isolate(self, level: str) -> None:
        """Set the isolation level of the transactions to come."""
        await self.given.execute(f"SET default_transaction_isolation TO '{level}'")


class SQLAlchemy:
    """AsyncConnection or AsyncSession of SQLAlchemy."""

    def __init__(self, given: "AsyncConnection | AsyncSession") -> None:
        self.given: Any = given

    def transaction(self) -> AbstractAsyncContextManager[Any]:
        """Begin; the end of the block commits, and an error rolls back."""
        return self.given.begin()  # type: ignore[no-any-return]

    def savepoint(self) -> AbstractAsyncContextManager[Any]:
        """Set a savepoint, to which an error in the block rolls back."""
        return self.given.begin_nested()  # type: ignore[no-any-return]

    async def execute(self, statement: str) -> None:
        """Run a statement of the caller's."""
        from sqlalchemy import text

        await self.given.execute(text(statement))

    async def isolate(self, level: str) -> None:
        """Set the isolation level of the transactions to come."""
        async with self.given.begin():
            await self.execute(
                f"SET SESSION CHARACTERISTICS AS TRANSACTION ISOLATION LEVEL {level}"
            )


Connection = Asyncpg | SQLAlchemy


@asynccontextmanager
async def connected(kind: str, url: str, **options: Any) -> AsyncIterator[Connection]:
    """Connect as a caller does, with this kind of connection."""
    match kind:
        case "asyncpg":
            connection = await asyncpg.connect(url)
            yield Asyncpg(connection)
            await connection.close()
        case "asyncpg-pool":
            pool = asyncpg.create_pool(url, min_size=1, max_size=1)
            async with pool, pool.acquire() as pooled:
                yield Asyncpg(pooled)
        case _:
            from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

            engine = create_async_engine(
                url.replace("postgresql://", "postgresql+asyncpg://"), **options
            )
            if kind == "sqlalchemy-connection":
                async with engine.connect() as given:
                    yield SQLAlchemy(given)
            else:
                async with AsyncSession(engine) as session:
                    yield SQLAlchemy(session)
            await engine.dispose()


KINDS = [
    "asyncpg",
    pytest.param("asyncpg-pool", marks=pytest.mark.thorough),
    # `make test` installs no SQLAlchemy.
    pytest.param("sqlalchemy-connection", marks=pytest.mark.thorough),
    pytest.param("sqlalchemy-session", marks=pytest.mark.thorough),
]


@pytest.fixture(params=KINDS)
async def connection(
    request: pytest.FixtureRequest, queue: Queue[None], database_url: str
) -> AsyncIterator[Connection]:
    """Each kind of connection in turn."""
    async with connected(request.param, database_url) as connection:
        yield connection


@asynccontextmanager
async def rolled_back(transaction: AbstractAsyncContextManager[Any]) -> AsyncIterator[None]:
    """Roll back at the end of the block, because an error of the caller's ends it."""
    with contextlib.suppress(WentWrongError):
        async with transaction:
            yield
            raise WentWrongError


async def order(connection: Connection, name: str) -> None:
    """Write a row of the caller's."""
    await connection.execute(f"INSERT INTO shop.orders VALUES ('{name}')")


# Together, or not at all


async def test_a_row_and_its_task_are_committed_together(
    queue: Queue[None], connection: Connection, sql: Sql
) -> None:
    async with connection.transaction():
        await order(connection, "ada")
        await queue.add_task_in(connection.given, greet, name="ada")
        assert orders_and_tasks(sql) == ([], [])  # other connections see neither yet
    assert orders_and_tasks(sql) == (["ada"], ["ada"])


async def test_a_rollback_leaves_neither(
    queue: Queue[None], connection: Connection, sql: Sql
) -> None:
    async with rolled_back(connection.transaction()):
        await order(connection, "ada")
        await queue.add_task_in(connection.given, greet, name="ada")
    assert orders_and_tasks(sql) == ([], [])


async def test_the_task_may_come_before_any_statement_of_the_callers(
    queue: Queue[None], connection: Connection, sql: Sql
) -> None:
    """SQLAlchemy sends BEGIN with its first statement, and the task must not come before that."""
    async with rolled_back(connection.transaction()):
        await queue.add_task_in(connection.given, greet, name="ada")
        await order(connection, "ada")
    assert orders_and_tasks(sql) == ([], [])


async def test_a_savepoint_takes_its_own_tasks_away(
    queue: Queue[None], connection: Connection, sql: Sql
) -> None:
    async with connection.transaction():
        await order(connection, "ada")
        await queue.add_task_in(connection.given, greet, name="ada")
        async with rolled_back(connection.savepoint()):
            await order(connection, "bob")
            await queue.add_task_in(connection.given, greet, name="bob")
        async with connection.savepoint():
            await order(connection, "eve")
            await queue.add_task_in(connection.given, greet, name="eve")
    assert orders_and_tasks(sql) == (["ada", "eve"], ["ada", "eve"])


@pytest.mark.parametrize("level", ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"])
async def test_every_isolation_level_will_do(
    level: str, queue: Queue[None], connection: Connection, sql: Sql
) -> None:
    """Also while another task is put, and a worker claims one."""
    await connection.isolate(level)
    async with connection.transaction():
        await connection.execute(
            "DO $$ BEGIN "
            f"ASSERT current_setting('transaction_isolation') = '{level.lower()}'; END $$"
        )
        await order(connection, "ada")
        await promise(queue, greet, name="meanwhile")
        await queue.engine.claim("worker", kinds=["greet"], limit=1, now=queue.now(), lease=30)
        await queue.add_task_in(connection.given, greet, name="ada")
    assert orders_and_tasks(sql) == (["ada"], ["meanwhile", "ada"])


# The task


async def test_the_row_is_the_one_that_the_queue_writes(
    queue: Queue[None], connection: Connection, sql: Sql
) -> None:
    put = await promise(queue, greet, name='Zoë "\\" \0 \ud83d')
    async with connection.transaction():
        added = await queue.add_task_in(connection.given, greet, name='Zoë "\\" \0 \ud83d')

    assert await queue.engine.get(added.id) == added
    assert (added.kind, added.arguments, added.max_attempts) == (
        put.kind,
        put.arguments,
        put.max_attempts,
    )
    times = "id, created_at, updated_at, due_at, ready_at, seq"
    rows = sql(
        "SELECT DISTINCT to_jsonb(tasks) "
        + "".join(f"- '{column}' " for column in times.split(", "))
        + "FROM afterward.tasks"
    )
    assert len(rows.splitlines()) == 1
    assert sql("SELECT status, sum(tasks) FROM afterward.counts GROUP BY status") == "queued|2"


async def test_arguments_may_have_any_names(queue: Queue[None], connection: Connection) -> None:
    async with connection.transaction():
        task = await queue.add_task_in(connection.given, connect, connection="a", function="b")
    assert json.loads(task.arguments)["kwargs"] == {"connection": "a", "function": "b"}


async def test_arguments_may_have_types_other_than_json(
    queue: Queue[None], connection: Connection
) -> None:
    at = datetime.now(UTC)
    async with connection.transaction():
        task = await queue.add_task_in(connection.given, remind, at=at)
    await Worker(queue, None).run_until_idle()
    done = await queue.engine.get(task.id)
    assert done.status is Status.SUCCEEDED
    assert datetime.fromisoformat(json.loads(done.result or "")) == at


async def test_a_worker_is_woken_by_the_commit(
    queue: Queue[None], connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_module, "POLL_SECONDS", 60.0)
    recorder = EventRecorder(queue)
    async with working(queue):
        async with connection.transaction():
            task = await queue.add_task_in(connection.given, greet, name="ada")
        done = await recorder.until(EventType.SUCCEEDED)
    assert done.task.id == task.id


async def test_no_event_tells_of_a_task_that_may_be_rolled_back(
    queue: Queue[None], connection: Connection
) -> None:
    recorder = EventRecorder(queue)
    async with connection.transaction():
        await queue.add_task_in(connection.given, greet, name="ada")
    assert recorder.events == []


# The caller's connection


async def test_the_settings_of_the_connection_stay_as_they_are(
    queue: Queue[None], connection: Connection, sql: Sql
) -> None:
    settings = "SELECT name, setting FROM pg_settings"
    async with connection.transaction():
        await connection.execute("SET LOCAL search_path TO shop")
        await connection.execute("SET LOCAL client_min_messages TO error")
        await connection.execute(f"CREATE TEMPORARY TABLE before ON COMMIT DROP AS {settings}")
        await queue.add_task_in(connection.given, greet, name="ada")
        await connection.execute("INSERT INTO orders VALUES ('ada')")
        await connection.execute(
            f"DO $$ BEGIN ASSERT NOT EXISTS (TABLE before EXCEPT {settings}); END $$"
        )
    assert orders_and_tasks(sql) == (["ada"], ["ada"])


async def test_the_search_path_may_lead_to_other_functions_and_tables(
    queue: Queue[None], connection: Connection, sql: Sql
) -> None:
    sql(
        """
        CREATE TABLE shop.tasks (id text);
        CREATE FUNCTION shop.now() RETURNS timestamptz LANGUAGE sql AS 'SELECT NULL::timestamptz';
        CREATE FUNCTION shop.pg_notify(text, text) RETURNS void LANGUAGE sql AS '';
        """
    )
    async with connection.transaction():
        await connection.execute("SET LOCAL search_path TO shop, pg_catalog")
        await queue.add_task_in(connection.given, greet, name="ada")
    assert orders_and_tasks(sql) == ([], ["ada"])


async def test_codecs_of_the_callers_do_not_matter(
    queue: Queue[None], database_url: str, sql: Sql
) -> None:
    connection = await asyncpg.connect(database_url)
    for name in ("json", "jsonb", "float8", "int4", "timestamptz"):
        await connection.set_type_codec(
            name, schema="pg_catalog", encoder=lambda _: "0", decoder=json.loads
        )
    async with connection.transaction():
        task = await queue.add_task_in(connection, greet, name="ada")
    await connection.close()
    assert await queue.engine.get(task.id) == task
    assert orders_and_tasks(sql) == ([], ["ada"])


async def test_another_client_encoding_does_not_matter(
    queue: Queue[None], database_url: str
) -> None:
    connection = await asyncpg.connect(database_url, server_settings={"client_encoding": "LATIN1"})
    async with connection.transaction():
        task = await queue.add_task_in(connection, greet, name="Zoë 🎉")
    await connection.close()
    assert await queue.engine.get(task.id) == task


async def test_a_role_needs_few_rights(
    queue: Queue[None], postgres: Postgres, database_url: str, sql: Sql
) -> None:
    """The docstring of add_task_in names them."""
    role = f"shop_{os.getpid()}"
    sql(
        f"""
        CREATE ROLE {role} LOGIN PASSWORD 'correct-horse';
        GRANT USAGE ON SCHEMA afterward TO {role};
        GRANT INSERT ON afterward.tasks, afterward.counts TO {role};
        """
    )
    connection = await asyncpg.connect(database_url, user=role)
    async with connection.transaction():
        await queue.add_task_in(connection, greet, name="ada")
    await connection.close()
    sql(f"DROP OWNED BY {role}; DROP ROLE {role}")
    assert orders_and_tasks(sql) == ([], ["ada"])


# Refusals


async def test_arguments_and_functions_are_checked_before_the_connection_is_used(
    queue: Queue[None], connection: Connection, sql: Sql
) -> None:
    """So that the transaction can go on."""
    async with connection.transaction():
        await order(connection, "ada")
        with pytest.raises(TypeError, match="nme"):
            await queue.add_task_in(connection.given, greet, nme="ada")  # type: ignore[call-arg]
        with pytest.raises(TypeError, match="fail is not in the registry"):
            await queue.add_task_in(connection.given, fail)
    assert orders_and_tasks(sql) == (["ada"], [])


async def test_a_full_backlog_refuses_the_task_and_leaves_the_transaction_usable(
    database_url: str, connection: Connection, sql: Sql
) -> None:
    async with queue_on(database_url, max_backlog=1) as queue:
        await promise(queue, greet, name="first")
        async with connection.transaction():
            await order(connection, "ada")
            with pytest.raises(BacklogFull):
                await queue.add_task_in(connection.given, greet, name="ada")
    assert orders_and_tasks(sql) == (["ada"], ["first"])


async def test_what_was_rolled_back_takes_no_room_in_the_backlog(
    database_url: str, connection: Connection, sql: Sql
) -> None:
    async with queue_on(database_url, max_backlog=1) as queue:
        async with rolled_back(connection.transaction()):
            await queue.add_task_in(connection.given, greet, name="ada")
        async with connection.transaction():
            await queue.add_task_in(connection.given, greet, name="bob")
    assert orders_and_tasks(sql) == ([], ["bob"])


async def test_errors_of_the_database_are_the_callers_own(
    queue: Queue[None], connection: Connection, sql: Sql
) -> None:
    """The same error as from a statement of the caller's."""
    statement = "INSERT INTO shop.orders VALUES ('ada')"

    async def error_of(write: Callable[[], Awaitable[object]]) -> Exception:
        try:
            async with connection.transaction():
                await connection.execute("SET TRANSACTION READ ONLY")
                await write()
        except Exception as error:  # noqa: BLE001 - asyncpg's, or SQLAlchemy's
            return error
        raise AssertionError("a transaction that is read-only has written something")

    own = await error_of(lambda: connection.execute(statement))
    ours = await error_of(lambda: queue.add_task_in(connection.given, greet, name="ada"))
    assert type(own) is type(ours)
    assert "read-only transaction" in str(ours)
    assert orders_and_tasks(sql) == ([], [])


@pytest.mark.parametrize("kind", ["asyncpg", "asyncpg-pool"])
async def test_a_connection_in_no_transaction_is_refused(
    kind: str, queue: Queue[None], database_url: str, sql: Sql
) -> None:
    async with connected(kind, database_url) as connection:
        with pytest.raises(RuntimeError, match=r"async with connection.transaction\(\)"):
            await queue.add_task_in(connection.given, greet, name="ada")
    assert orders_and_tasks(sql) == ([], [])


@pytest.mark.thorough
@pytest.mark.parametrize("kind", ["sqlalchemy-connection", "sqlalchemy-session"])
async def test_a_connection_that_commits_each_statement_is_refused(
    kind: str, queue: Queue[None], database_url: str, sql: Sql
) -> None:
    async with connected(kind, database_url, isolation_level="AUTOCOMMIT") as connection:
        with pytest.raises(RuntimeError, match="other than AUTOCOMMIT"):
            await queue.add_task_in(connection.given, greet, name="ada")
    assert orders_and_tasks(sql) == ([], [])


@pytest.mark.parametrize(
    ("connection", "name"), [(None, "NoneType"), ("postgresql://", "str"), (object(), "object")]
)
async def test_what_is_no_connection_is_refused_with_what_is_accepted(
    connection: object, name: str, queue: Queue[None]
) -> None:
    with pytest.raises(TypeError) as caught:
        await queue.add_task_in(connection, greet, name="ada")
    assert str(caught.value) == (
        "A task can be added through an asyncpg connection, or SQLAlchemy's AsyncConnection or "
        f"AsyncSession on postgresql+asyncpg, not through {name}."
    )


@pytest.mark.thorough
async def test_sessions_of_another_kind_are_refused_with_what_is_accepted(
    queue: Queue[None],
) -> None:
    """A synchronous session, and a connection on another driver."""
    from sqlalchemy import create_mock_engine
    from sqlalchemy.orm import Session

    with pytest.raises(TypeError, match=r"not through sqlalchemy\.orm\.session\.Session"):
        await queue.add_task_in(Session(), greet, name="ada")

    class OnSQLite:
        dialect = create_mock_engine("sqlite://", print).dialect

        def get_raw_connection(self) -> None:
            """As AsyncConnection has it."""

    with pytest.raises(TypeError, match="not through SQLAlchemy's connection on pysqlite"):
        await queue.add_task_in(OnSQLite(), greet, name="ada")


async def test_on_sqlite_the_error_names_the_outbox(tmp_path: Path) -> None:
    async with opened(tmp_path / "queue.db") as engine:
        queue = Queue[None](engine, Registry(greet), RetryPolicy())
        with pytest.raises(RuntimeError, match=r"outbox .* examples/4_your_own_database.py"):
            await queue.add_task_in(object(), greet, name="ada")


# Side by side


async def test_serializable_transactions_do_not_fail_because_of_their_tasks(
    queue: Queue[None], database_url: str, sql: Sql
) -> None:
    """They are all open at once, while a worker claims tasks and retention adds up the counts."""
    async with contextlib.AsyncExitStack() as stack:
        for number in range(5):
            connection = await stack.enter_async_context(connected("asyncpg", database_url))
            await connection.isolate("SERIALIZABLE")
            await stack.enter_async_context(connection.transaction())
            await queue.add_task_in(connection.given, greet, name=f"{number}")
            await promise(queue, greet, name="meanwhile")
            await queue.engine.claim("worker", kinds=["greet"], limit=1, now=queue.now(), lease=30)
            await queue.engine.purge(finished_before=0, failed_before=0, answered_before=0, limit=1)
    _, names = orders_and_tasks(sql)
    assert set(names) == {"meanwhile", *map(str, range(5))}
    assert (await queue.engine.backlog()).counts[Status.QUEUED] == 5


async def test_many_transactions_at_once(queue: Queue[None], database_url: str, sql: Sql) -> None:
    """Half of them roll back, while a worker runs the tasks of the others."""

    async def buy(number: int) -> Task:
        async with connected("asyncpg", database_url) as connection:
            transaction = connection.transaction()
            async with rolled_back(transaction) if number % 2 else transaction:
                await order(connection, f"{number}")
                return await queue.add_task_in(connection.given, greet, name=f"{number}")

    recorder = EventRecorder(queue)
    async with working(queue):
        tasks = await asyncio.gather(*map(buy, range(20)))
        await recorder.until(EventType.SUCCEEDED, times=10)
    statuses = {task.id: (await queue.engine.get(task.id)).status for task in tasks[::2]}
    assert set(statuses.values()) == {Status.SUCCEEDED}
    orders, names = orders_and_tasks(sql)
    assert sorted(orders) == sorted(names) == sorted(map(str, range(0, 20, 2)))
