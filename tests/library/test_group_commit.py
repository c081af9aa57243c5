"""Group commit: operations that arrive together share a transaction, but each fails alone."""

import asyncio
import os
import sqlite3
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from afterward.engines.sqlite import engine as sqlite_engine
from afterward.engines.sqlite import group_commit
from afterward.engines.sqlite.database_file import open_database
from afterward.engines.sqlite.engine import SQLite
from afterward.engines.sqlite.group_commit import CHUNK_SIZE, GroupCommit, in_chunks
from afterward.errors import CannotStart, CommitUnknown, DiskFull, QueueUnavailable
from tests.library.support import opened

pytestmark = pytest.mark.anyio

Connection = sqlite3.Connection


@pytest.fixture
def statements() -> list[str]:
    """All statements that SQLite executes, in order."""
    return []


@pytest.fixture
async def commits(tmp_path: Path, statements: list[str]) -> AsyncIterator[GroupCommit]:
    """A group commit on a table of numbers that allows each number only once."""

    def connect() -> Connection:
        connection = sqlite3.connect(tmp_path / "numbers.db", timeout=0.05, isolation_level=None)
        connection.execute("CREATE TABLE numbers (n INTEGER PRIMARY KEY)")
        connection.set_trace_callback(statements.append)
        return connection

    commits = GroupCommit(connect, print)
    await commits.start()
    yield commits
    await commits.stop()


def insert(connection: Connection, several: Sequence[int]) -> list[int]:
    """Write numbers, each CHUNK_SIZE in a statement; gives them back."""
    for some in in_chunks(several):
        values = ", ".join(["(?)"] * len(some))
        connection.execute(f"INSERT INTO numbers VALUES {values}", some)
    return list(several)


def writing(n: int) -> Callable[[Connection], int]:
    """Make an operation that inserts a number and returns it."""

    def write(connection: Connection) -> int:
        insert(connection, [n])
        return n

    return write


def numbers(connection: Connection) -> list[int]:
    return [n for (n,) in connection.execute("SELECT n FROM numbers ORDER BY n")]


async def test_operations_that_arrive_together_share_a_transaction(
    commits: GroupCommit, statements: list[str]
) -> None:
    results = await asyncio.gather(*(commits.run(writing(n)) for n in range(50)))
    assert results == list(range(50))
    assert statements.count("BEGIN IMMEDIATE") == statements.count("COMMIT") == 1


async def test_operations_that_arrive_during_a_commit_share_the_next_one(
    commits: GroupCommit, statements: list[str]
) -> None:
    disk_is_slow = threading.Event()
    first = asyncio.create_task(commits.run(lambda _: disk_is_slow.wait(5)))
    await asyncio.sleep(0.01)
    others = [asyncio.create_task(commits.run(writing(n))) for n in range(50)]
    await asyncio.sleep(0.01)
    assert not any(other.done() for other in others)
    disk_is_slow.set()
    assert await first
    assert await asyncio.gather(*others) == list(range(50))
    assert statements.count("COMMIT") == 2


async def test_an_operation_that_follows_from_a_commit_joins_the_next_one(
    commits: GroupCommit, statements: list[str]
) -> None:
    """When a task's end is committed, the worker claims the next task: that claim joins at once."""
    disk_is_slow = threading.Event()
    answered = asyncio.Event()

    async def first() -> None:
        await commits.run(lambda _: disk_is_slow.wait(5))
        answered.set()

    async def follower() -> None:
        await answered.wait()
        await commits.run(writing(2))

    async with asyncio.TaskGroup() as callers:
        callers.create_task(first())
        callers.create_task(follower())
        await asyncio.sleep(0.01)
        callers.create_task(commits.run(writing(1)))
        await asyncio.sleep(0.01)
        disk_is_slow.set()
    assert statements.count("COMMIT") == 2


async def test_inserts_that_arrive_together_are_one_statement(
    commits: GroupCommit, statements: list[str]
) -> None:
    assert await asyncio.gather(
        *(commits.run_merged(insert, n) for n in range(CHUNK_SIZE))
    ) == list(range(CHUNK_SIZE))
    (statement,) = statements
    assert statement.startswith("INSERT")


async def test_inserts_that_need_two_statements_share_a_transaction(
    commits: GroupCommit, statements: list[str]
) -> None:
    await asyncio.gather(*(commits.run_merged(insert, n) for n in range(CHUNK_SIZE + 1)))
    assert [statement.split()[0] for statement in statements] == [
        "BEGIN",
        "INSERT",
        "INSERT",
        "COMMIT",
    ]


async def test_an_operation_sees_earlier_writes_of_its_group(commits: GroupCommit) -> None:
    _, seen = await asyncio.gather(commits.run_merged(insert, 1), commits.run(numbers))
    assert seen == [1]


async def test_an_operation_that_fails_fails_alone(commits: GroupCommit) -> None:
    """Its own writes are rolled back; the rest of its group is committed."""

    def write_and_fail(connection: Connection) -> None:
        insert(connection, [666])
        raise LookupError("its own error")

    outcomes = await asyncio.gather(
        commits.run(writing(1)),
        commits.run(write_and_fail),
        commits.run_merged(insert, 2),
        return_exceptions=True,
    )
    assert outcomes[0] == 1
    assert isinstance(outcomes[1], LookupError)
    assert outcomes[2] == 2
    assert await commits.run(numbers) == [1, 2]


async def test_a_mistake_in_a_statement_fails_alone(commits: GroupCommit) -> None:
    """An error of the disk meets the whole group; a wrong statement meets only its operation."""

    def ask(connection: Connection) -> object:
        return connection.execute("SELECT unknown")

    one, mistake, two = await asyncio.gather(
        commits.run(writing(1)), commits.run(ask), commits.run(writing(2)), return_exceptions=True
    )
    assert isinstance(mistake, sqlite3.OperationalError)
    assert (one, two) == (1, 2)


async def test_after_a_failed_rollback_the_next_commit_holds_none_of_its_writes(
    tmp_path: Path,
) -> None:
    """The thread of the group commit survives too."""
    refused: list[str] = []

    class Refusing(Connection):
        def execute(self, statement: str, *values: Any) -> sqlite3.Cursor:
            if statement == "ROLLBACK" and not refused:
                refused.append(statement)
                raise sqlite3.OperationalError
            return super().execute(statement, *values)

    def connect() -> Connection:
        connection = sqlite3.connect(
            tmp_path / "numbers.db", isolation_level=None, factory=Refusing
        )
        connection.execute("CREATE TABLE numbers (n INTEGER PRIMARY KEY)")
        return connection

    def write_and_fail(connection: Connection) -> None:
        insert(connection, [666])
        raise LookupError

    await (commits := GroupCommit(connect, print)).start()
    with pytest.raises(LookupError):
        await commits.run(write_and_fail)
    assert refused
    assert await commits.run(writing(1)) == 1
    assert await commits.run(numbers) == [1]
    await commits.stop()
    assert not commits.is_using_file


async def test_a_disk_that_hangs_does_not_delay_the_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(group_commit, "CLOSE_SECONDS", 0.05)
    disk_is_back = threading.Event()
    async with opened(path := tmp_path / "queue.db") as engine:
        hanging = asyncio.create_task(engine._commits.run(lambda _: disk_is_back.wait(30)))
        await asyncio.sleep(0.01)
    assert not hanging.done()
    # The commit may still be written, so the file stays locked until the process has ended.
    with pytest.raises(CannotStart, match="in use"):
        await SQLite(path).start()
    disk_is_back.set()
    assert await hanging
    engine._commits._thread.join()
    os.close(engine._lock)


async def test_an_insert_that_fails_in_a_shared_statement_fails_alone(commits: GroupCommit) -> None:
    shares = (commits.run_merged(insert, n) for n in (1, 2, 1, 3))
    outcomes = await asyncio.gather(*shares, return_exceptions=True)
    assert isinstance(outcomes.pop(2), sqlite3.IntegrityError)
    assert outcomes == [1, 2, 3]
    assert await commits.run(numbers) == [1, 2, 3]


async def test_a_locked_database_refuses_the_whole_group_at_once(
    commits: GroupCommit, tmp_path: Path, statements: list[str]
) -> None:
    """The group is tried once, because every operation of the group waits during each trial."""
    with closing(sqlite3.connect(tmp_path / "numbers.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        writes = (commits.run(writing(n)) for n in range(50))
        outcomes = await asyncio.gather(*writes, return_exceptions=True)
    assert {type(outcome) for outcome in outcomes} == {QueueUnavailable}
    assert statements == ["BEGIN IMMEDIATE"]


async def test_a_cancelled_caller_does_not_affect_its_group(commits: GroupCommit) -> None:
    """Whether its own operation was committed stays open: its client is gone, so either is fine."""
    tasks = [asyncio.create_task(commits.run(writing(n))) for n in range(10)]
    await asyncio.sleep(0)
    tasks[3].cancel()
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(outcomes.pop(3), asyncio.CancelledError)
    assert outcomes == [0, 1, 2, 4, 5, 6, 7, 8, 9]


async def test_a_stop_finishes_the_operations_that_arrived_before(tmp_path: Path) -> None:
    def connect() -> Connection:
        return sqlite3.connect(tmp_path / "empty.db", isolation_level=None)

    commits = GroupCommit(connect, print)
    await commits.start()
    asked = [asyncio.create_task(commits.run(lambda _: "done")) for _ in range(10)]
    await asyncio.sleep(0)
    await commits.stop()
    assert await asyncio.gather(*asked) == ["done"] * 10


async def test_no_operation_waits_for_ever_if_it_arrives_during_the_stop(tmp_path: Path) -> None:
    """It is committed, or refused."""
    commits = GroupCommit(
        lambda: sqlite3.connect(tmp_path / "empty.db", isolation_level=None), print
    )
    await commits.start()
    stopping = asyncio.create_task(commits.stop())
    outcomes = []
    async with asyncio.timeout(5):
        while not stopping.done():
            outcomes.append(asyncio.ensure_future(commits.run(lambda _: "done")))
            await asyncio.sleep(0)
        results = await asyncio.gather(*outcomes, return_exceptions=True)
    assert {"done", QueueUnavailable} == {
        result if isinstance(result, str) else type(result) for result in results
    }


async def test_a_stop_that_is_cancelled_ends_the_thread_and_unlocks_the_file(
    tmp_path: Path,
) -> None:
    path, disk_is_back = tmp_path / "queue.db", threading.Event()
    await (engine := SQLite(path)).start()
    hanging = asyncio.create_task(engine._commits.run(lambda _: disk_is_back.wait(30)))
    stopping = asyncio.create_task(engine.stop())
    await asyncio.sleep(0.05)
    stopping.cancel()
    with pytest.raises(asyncio.CancelledError):
        await stopping
    disk_is_back.set()
    assert await hanging
    await asyncio.to_thread(engine._commits._thread.join, 5)
    assert not engine._commits.is_using_file
    os.close(engine._lock)


async def test_a_start_that_is_cancelled_closes_and_unlocks_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opening, go_on = threading.Event(), threading.Event()
    connections: list[Connection] = []

    def open_slowly(path: Path) -> Connection:
        opening.set()
        go_on.wait(30)
        connections.append(open_database(path))
        return connections[0]

    monkeypatch.setattr(sqlite_engine, "open_database", open_slowly)
    engine = SQLite(path := tmp_path / "queue.db")
    starting = asyncio.create_task(engine.start())
    await asyncio.to_thread(opening.wait, 5)
    starting.cancel()
    await asyncio.sleep(0.05)
    with pytest.raises(CannotStart, match="in use"):  # the thread is still opening the file
        await SQLite(path).start()
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await starting
    with pytest.raises(sqlite3.ProgrammingError, match="closed"):
        connections[0].execute("SELECT 1")
    monkeypatch.undo()
    async with opened(path):
        pass


def test_the_thread_ends_without_an_error_if_the_loop_was_closed_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error in a thread would be a warning, which fails the test."""
    monkeypatch.setattr(group_commit, "CLOSE_SECONDS", 0.05)
    disk_is_back = threading.Event()

    async def stop_while_the_disk_hangs() -> GroupCommit:
        commits = GroupCommit(
            lambda: sqlite3.connect(tmp_path / "empty.db", isolation_level=None), print
        )
        await commits.start()
        hanging = asyncio.create_task(commits.run(lambda _: disk_is_back.wait(30)))
        await commits.stop()
        hanging.cancel()
        return commits

    commits = asyncio.run(stop_while_the_disk_hangs())
    disk_is_back.set()
    commits._thread.join(5)
    assert not commits.is_using_file


async def test_a_start_raises_the_error_of_its_connection() -> None:
    def connect() -> Connection:
        raise LookupError("no such place")

    with pytest.raises(LookupError, match="no such place"):
        await GroupCommit(connect, print).start()


# The outcome of a commit


class Failing(sqlite3.Connection):
    """A connection on which each statement in `errors` fails once, with this SQLite error code."""

    errors: dict[str, int]

    def execute(self, sql: str, *values: Any) -> sqlite3.Cursor:
        """Fail, or execute the statement."""
        if sql in self.errors:
            raise failure(self.errors.pop(sql))
        return super().execute(sql, *values)


def failure(code: int) -> sqlite3.OperationalError:
    error = sqlite3.OperationalError("it failed")
    error.sqlite_errorcode = code
    return error


@pytest.fixture
async def failing(tmp_path: Path) -> AsyncIterator[tuple[GroupCommit, dict[str, int]]]:
    """A group commit on a table of numbers, and a dict for the statements that must fail."""
    errors: dict[str, int] = {}

    def connect() -> Connection:
        connection = sqlite3.connect(tmp_path / "numbers.db", isolation_level=None, factory=Failing)
        connection.errors = errors
        connection.execute("CREATE TABLE numbers (n INTEGER PRIMARY KEY)")
        return connection

    commits = GroupCommit(connect, print)
    await commits.start()
    yield commits, errors
    await commits.stop()


@pytest.mark.parametrize(
    ("statement", "code", "raised"),
    [
        ("COMMIT", sqlite3.SQLITE_IOERR_FSYNC, CommitUnknown),
        ("COMMIT", sqlite3.SQLITE_BUSY, QueueUnavailable),
        ("COMMIT", sqlite3.SQLITE_FULL, DiskFull),
        ("BEGIN IMMEDIATE", sqlite3.SQLITE_IOERR_READ, QueueUnavailable),
        ("INSERT INTO numbers VALUES (?)", sqlite3.SQLITE_IOERR_READ, QueueUnavailable),
    ],
)
async def test_only_a_commit_that_meets_a_disk_error_has_an_unknown_outcome(
    failing: tuple[GroupCommit, dict[str, int]],
    statement: str,
    code: int,
    raised: type[QueueUnavailable],
) -> None:
    commits, errors = failing
    errors[statement] = code
    with pytest.raises(QueueUnavailable) as error:
        await commits.run(writing(1))
    assert error.type is raised
    assert await commits.run(writing(2)) == 2
    assert await commits.run(numbers) == [2]


async def test_a_read_in_a_commit_of_unknown_outcome_is_unavailable(
    failing: tuple[GroupCommit, dict[str, int]],
) -> None:
    """It has changed nothing, so there is nothing to be unknown."""
    commits, errors = failing
    errors["COMMIT"] = sqlite3.SQLITE_IOERR_FSYNC
    outcomes = await asyncio.gather(
        commits.run(writing(1)), commits.run(numbers), return_exceptions=True
    )
    assert [type(outcome) for outcome in outcomes] == [CommitUnknown, QueueUnavailable]


async def test_a_statement_that_commits_by_itself_can_have_an_unknown_outcome(
    failing: tuple[GroupCommit, dict[str, int]],
) -> None:
    commits, errors = failing
    errors["INSERT INTO numbers VALUES (?)"] = sqlite3.SQLITE_IOERR_FSYNC
    with pytest.raises(CommitUnknown):
        await commits.run_merged(insert, 1)
