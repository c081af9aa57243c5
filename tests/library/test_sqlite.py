"""The SQLite engine, beyond the contract: its file, its lock, its query plans, its group commit."""

import asyncio
import errno
import fcntl
import os
import sqlite3
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from afterward.bulk import Action
from afterward.engines.sqlite import engine as sqlite_engine
from afterward.engines.sqlite.engine import SQLite
from afterward.errors import (
    CannotStart,
    KeyTaken,
    QueueUnavailable,
    TaskNotFound,
    TaskNotGivenUp,
)
from afterward.events import EventType
from afterward.filter import TaskFilter
from afterward.retry import Bounds
from afterward.task import Answer, Status, Writes
from afterward.unit_of_work import Context
from tests.library.support import (
    KINDS,
    LEASE,
    NOW,
    EventRecorder,
    a_task,
    claim_all,
    claim_one,
    in_batch,
    opened,
    promise,
    put,
    queue_of,
    recover,
    retry,
    working,
)
from tests.support.service import PATIENCE

pytestmark = pytest.mark.anyio

HOLD_A_TASK = """
import asyncio, sys
from pathlib import Path
from afterward.engines.sqlite.engine import SQLite
from tests.library.support import a_task, claim_one, put

async def hold_a_task():
    engine = SQLite(Path(sys.argv[1]))
    await engine.start()
    await put(engine, a_task())
    await claim_one(engine)
    print("held", flush=True)
    await asyncio.sleep(60)

asyncio.run(hold_a_task())
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "var" / "queue.db"


@pytest.fixture
async def engine(path: Path) -> AsyncIterator[SQLite]:
    async with opened(path) as engine:
        yield engine


async def rows(engine: SQLite, statement: str) -> list[Any]:
    return await engine._commits.run(lambda connection: connection.execute(statement).fetchall())


async def refusal(path: Path) -> str:
    """Start on this file, which must fail, and return the reason."""
    with pytest.raises(CannotStart) as raised:
        await SQLite(path).start()
    message = str(raised.value)
    assert str(path) in message
    assert "\n" not in message
    return message


# One process


@pytest.fixture
def process(path: Path) -> Iterator[subprocess.Popen[str]]:
    """A second process, which has started on the file and holds its only task."""
    command = [sys.executable, "-c", HOLD_A_TASK, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


async def test_a_killed_process_releases_the_file_and_its_tasks(
    path: Path, process: subprocess.Popen[str]
) -> None:
    """Its tasks are re-queued before their leases expire, because the free lock shows its death."""
    process.kill()
    process.wait()
    async with opened(path) as engine:
        (recovered,) = await recover(engine, "worker-2", now=NOW)
        assert (recovered.status, recovered.crashes) == (Status.RETRYING, 1)


def die_in_the_middle_of_the_first_write(path: Path) -> None:
    """Leave half a file and a rollback journal, like a process killed during its first write."""
    dying = f"""
import os, sqlite3
db = sqlite3.connect({str(path)!r}, isolation_level=None)
db.execute("PRAGMA cache_size = 1")
db.execute("BEGIN")
db.execute("CREATE TABLE half (a)")
db.executemany("INSERT INTO half VALUES (?)", [("x" * 1000,)] * 500)
os._exit(1)
"""
    path.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run([sys.executable, "-c", dying], check=False)
    assert path.with_name(path.name + "-journal").stat().st_size > 0


async def test_a_start_succeeds_after_a_process_was_killed_while_it_made_the_file(
    path: Path,
) -> None:
    die_in_the_middle_of_the_first_write(path)

    async with opened(path) as engine:
        await put(engine, a_task())


async def test_a_second_engine_in_this_process_is_refused_too(engine: SQLite, path: Path) -> None:
    assert "in use" in await refusal(path)
    await engine.check()


async def test_a_task_is_still_there_at_the_next_start(path: Path) -> None:
    task = a_task()
    async with opened(path) as engine:
        await put(engine, task)
    async with opened(path) as engine:
        assert await engine.get(task.id) == task


async def test_an_old_sqlite_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite3, "sqlite_version_info", (3, 36, 0))
    monkeypatch.setattr(sqlite3, "sqlite_version", "3.36.0")
    with pytest.raises(CannotStart, match=r"^SQLite 3\.37 or newer is needed, .* has 3\.36\.0$"):
        await SQLite(path).start()


async def test_a_path_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "cannot be opened" in await refusal(tmp_path / "file" / "queue.db")


# Speed


def pull_forward(engine: SQLite) -> Awaitable[object]:
    return engine.pull_forward(kinds=KINDS, now=NOW, longest_wait=LEASE, limit=10)


def extend(engine: SQLite) -> Awaitable[object]:
    return engine.extend("worker-1", now=NOW, lease=LEASE)


def purge(engine: SQLite) -> Awaitable[object]:
    return engine.purge(finished_before=NOW, failed_before=NOW, answered_before=NOW, limit=10)


async def count_batch(engine: SQLite) -> None:
    await engine.put(Writes(in_batch("batch", a_task())))
    await engine.count_batch("batch", client="")


def list_batches(engine: SQLite) -> Awaitable[object]:
    return engine.list_batches("", limit=10)


def listing(**conditions: Any) -> Callable[[SQLite], Awaitable[object]]:
    """Return a function that lists and counts the tasks which meet these conditions."""

    async def find(engine: SQLite) -> None:
        await put(engine, a_task(client=conditions.get("client", "")))
        wanted = TaskFilter(**conditions)
        await engine.list_tasks(wanted, limit=10)
        await engine.count_tasks(wanted)

    return find


def slice_of(action: Action) -> Callable[[SQLite], Awaitable[object]]:
    async def change_slice(engine: SQLite) -> None:
        await put(engine, a_task(), other := a_task())
        task = await claim_one(engine)
        await engine.cancel(other.id, NOW)
        wanted = TaskFilter().acted_on(action, NOW)
        await engine.change_slice(
            task, wanted, limit=9, most=9, bounds_of=lambda _: Bounds(8), now=NOW
        )

    return change_slice


async def list_changed(engine: SQLite) -> None:
    await put(engine, a_task())
    await engine.list_changed("", since=NOW, now=NOW, limit=10)


async def list_failed(engine: SQLite) -> None:
    await engine.list_failed("ada", limit=5)


@pytest.mark.parametrize(
    ("ask", "indexes"),
    [
        (claim_all, {"tasks_due", "tasks_held"}),
        (SQLite.backlog, {"tasks_due"}),
        (pull_forward, {"tasks_due"}),
        (extend, {"tasks_held"}),
        (list_changed, {"tasks_finished", "tasks_held", "tasks_by_state", "tasks_due"}),
        (list_changed, {"tasks_failed", "tasks_retrying"}),
        (list_failed, {"tasks_failed"}),
        (listing(statuses=(Status.FAILED,)), {"tasks_by_state"}),
        (listing(kind="greet", statuses=(Status.QUEUED,), since=NOW), {"tasks_by_state"}),
        (listing(error="PermanentError 550"), {"tasks_by_error"}),
        (listing(client="ada"), {"tasks_by_client"}),
        (listing(about="ada@example.com"), {"tasks_about"}),
        (listing(request_id="request-1"), {"tasks_by_request"}),
        (listing(batch_id="batch-1", statuses=(Status.FAILED,)), {"tasks_by_batch"}),
        (list_batches, {"tasks_by_batch"}),
        (count_batch, {"tasks_by_batch"}),
        (slice_of(Action.RETRY), {"tasks_by_state"}),
        (slice_of(Action.CANCEL), {"tasks_by_state"}),
        (purge, {"tasks_finished", "answers_by_age", "tasks_by_batch"}),
    ],
)
async def test_every_operation_uses_an_index_and_sorts_nothing(
    engine: SQLite, ask: Callable[[SQLite], Awaitable[object]], indexes: set[str]
) -> None:
    """Because of that, a backlog of 100,000 tasks slows no operation down."""
    statements: list[str] = []
    for thread in (engine._commits, engine._searches):
        await thread.run(lambda connection: connection.set_trace_callback(statements.append))
    await ask(engine)
    for thread in (engine._commits, engine._searches):
        await thread.run(lambda connection: connection.set_trace_callback(None))
    steps = [
        step
        for statement in statements
        if statement.strip().startswith(("SELECT", "UPDATE", "DELETE", "WITH"))
        for *_, step in await rows(engine, f"EXPLAIN QUERY PLAN {statement}")
    ]
    assert indexes <= {word for step in steps for word in step.split()}
    assert not {"SCAN tasks", "SCAN answers", "USE TEMP B-TREE FOR ORDER BY"} & set(steps)


async def test_a_commit_does_not_wait_for_a_search(engine: SQLite) -> None:
    """A count of a million tasks takes 0.3 s. A search sees what is committed when it begins."""
    commit_is_done = threading.Event()

    def count(connection: sqlite3.Connection) -> int:
        commit_is_done.wait(PATIENCE)
        return len(connection.execute("SELECT 1 FROM tasks").fetchall())

    search = asyncio.create_task(engine._searches.run(count))
    await put(engine, a_task())
    commit_is_done.set()
    assert await search == 1


async def test_searches_can_write_nothing(engine: SQLite) -> None:
    await put(engine, a_task())
    with pytest.raises(QueueUnavailable):
        await engine._searches.run(lambda connection: connection.execute("DELETE FROM tasks"))
    assert len(await engine.list_tasks(TaskFilter(), limit=9)) == 1


async def test_a_start_without_searches_fails_and_can_be_repeated(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For example, the process may open no more files."""

    def fail(_: Path) -> sqlite3.Connection:
        raise CannotStart("too many open files")

    with monkeypatch.context() as patched:
        patched.setattr(sqlite_engine, "open_for_searches", fail)
        with pytest.raises(CannotStart, match="too many"):
            await SQLite(path).start()
    async with opened(path) as engine:
        await put(engine, a_task())


async def test_a_stop_leaves_no_write_ahead_log(path: Path) -> None:
    """SQLite only removes it if a connection that may write is the last one to be closed."""
    async with opened(path) as engine:
        await put(engine, a_task())
        assert len(await engine.list_tasks(TaskFilter(), limit=9)) == 1
    assert {file.name for file in path.parent.iterdir()} == {"queue.db", "queue.db.lock"}


# The file


async def test_only_the_owner_may_read_the_database_and_its_directory(tmp_path: Path) -> None:
    path = tmp_path / "var" / "deep" / "queue.db"
    async with opened(path) as engine:
        await put(engine, a_task())
        modes = {file.name: file.stat().st_mode & 0o777 for file in path.parent.iterdir()}
    assert modes == dict.fromkeys(
        ["queue.db", "queue.db-shm", "queue.db-wal", "queue.db.lock"], 0o600
    )
    assert {folder.stat().st_mode & 0o777 for folder in (path.parent, tmp_path / "var")} == {0o700}


async def test_the_refusal_of_a_second_process_names_the_first(tmp_path: Path) -> None:
    path = tmp_path / "queue.db"
    async with opened(path):
        lock = Path(f"{path}.lock")
        lock.write_text("4321\n")  # noqa: ASYNC240 - a test may block
        with pytest.raises(CannotStart, match=r"by process 4321\. Stop it with `kill 4321`, or"):
            await SQLite(path).start()
        lock.write_text("")  # noqa: ASYNC240 - a test may block
        with pytest.raises(CannotStart, match=r"by another process\. Stop it, or use"):
            await SQLite(path).start()


async def test_the_refusal_names_no_process_of_another_container(tmp_path: Path) -> None:
    """The service may be process 1 in each container. Here, both engines are in this process."""
    path = tmp_path / "queue.db"
    async with opened(path):
        assert Path(f"{path}.lock").read_text() == f"{os.getpid()}\n"  # noqa: ASYNC240
        with pytest.raises(CannotStart, match=r"by another process\. Stop it, or use"):
            await SQLite(path).start()


async def test_a_full_lock_file_disk_does_not_stop_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", full)
    async with opened(tmp_path / "queue.db") as engine:
        await put(engine, a_task())


async def test_a_database_that_cannot_be_made_is_refused_with_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "queue.db"
    open_file = os.open

    def closed(file: Any, *arguments: Any) -> int:
        if file == path:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(file))
        return open_file(file, *arguments)

    monkeypatch.setattr(os, "open", closed)
    with pytest.raises(CannotStart, match=r"cannot be the queue's database: .*Permission denied"):
        await SQLite(path).start()


async def test_a_file_system_without_locks_is_named_as_the_cause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.raises(CannotStart, match=r"No locks available\. The file system has no locks"):
        await SQLite(tmp_path / "queue.db").start()


async def test_a_file_from_before_the_first_release_is_refused_and_left_unchanged(
    tmp_path: Path,
) -> None:
    path = tmp_path / "queue.db"
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(
            "CREATE TABLE tasks (due_at); CREATE INDEX tasks_due ON tasks (due_at); "
            "CREATE TABLE answers (key); PRAGMA user_version = 4"
        )
    before = path.read_bytes()
    with pytest.raises(CannotStart, match=r"older than the first release\. Move it away"):
        await SQLite(path).start()
    assert path.read_bytes() == before


async def test_a_wrong_statement_is_not_reported_as_an_outage(engine: SQLite) -> None:
    """It is raised as it is, because a wrong statement does not get right by waiting."""
    with pytest.raises(sqlite3.OperationalError, match="no such column"):
        await engine._commits.run(lambda connection: connection.execute("SELECT unknown"))


async def test_an_operation_that_finds_no_task_does_not_split_its_group(engine: SQLite) -> None:
    """Otherwise a request for a missing task would turn one transaction into sixty."""
    commits = count_commits(engine)
    asked = [put(engine, a_task()) for _ in range(30)] + [engine.get("nothing")]
    results = await asyncio.gather(
        *asked, *(put(engine, a_task()) for _ in range(30)), return_exceptions=True
    )
    assert [type(result) for result in results if result is not None] == [TaskNotFound]
    assert len(commits) == 1


async def test_a_retry_that_is_refused_does_not_split_its_group(engine: SQLite) -> None:
    """Otherwise a client could slow all others down, with retries of tasks that have not failed."""
    await put(engine, waiting := a_task(), failed := a_task(status=Status.FAILED))
    answer = Answer("used", "f", "{}", "/", NOW)
    await engine.put(Writes(answer=answer))
    commits = count_commits(engine)
    results = await asyncio.gather(
        put(engine, a_task()),
        retry(engine, waiting.id, NOW, Writes(answer=replace(answer, key="free"))),
        retry(engine, failed.id, NOW, Writes(answer=answer)),
        put(engine, a_task()),
        return_exceptions=True,
    )
    assert [type(result) for result in results if result] == [TaskNotGivenUp, KeyTaken]
    assert len(commits) == 1


async def test_an_idle_worker_claims_a_new_task_in_the_commit_that_stores_it(
    engine: SQLite,
) -> None:
    """So the task starts after one fsync, instead of two."""
    commits: list[str] = []
    commits_before: list[int] = []

    async def greet(context: Context[None]) -> None:
        commits_before.append(len(commits))

    queue = queue_of(engine, greet, now=lambda: NOW)
    recorder = EventRecorder(queue)
    async with working(queue):
        await promise(queue, greet)  # the first one also counts the backlog, in another commit
        await recorder.until(EventType.SUCCEEDED)
        await asyncio.sleep(0.05)  # the worker finds no other task, and waits
        commits = count_commits(engine)
        await promise(queue, greet)
        await recorder.until(EventType.SUCCEEDED, times=2)
    assert commits_before == [0, 1]


async def test_the_writes_of_an_operation_that_refuses_are_rolled_back(engine: SQLite) -> None:
    def write_and_refuse(connection: sqlite3.Connection) -> None:
        connection.execute("INSERT INTO counts VALUES ('odd', 1)")
        raise TaskNotFound

    _, refused = await asyncio.gather(
        put(engine, a_task()), engine._commits.run(write_and_refuse), return_exceptions=True
    )
    assert isinstance(refused, TaskNotFound)
    odd = await engine._commits.run(
        lambda connection: connection.execute(
            "SELECT count(*) FROM counts WHERE status = 'odd'"
        ).fetchone()
    )
    assert odd == (0,)


def count_commits(engine: SQLite) -> list[str]:
    """Return a list that grows by an item with each commit of the engine."""
    commits: list[str] = []
    commit = engine._commits._commit

    def counted(connection: sqlite3.Connection, group: Any) -> Any:
        commits.append("group")
        return commit(connection, group)

    engine._commits._commit = counted  # type: ignore[method-assign]
    return commits
