"""The database's file is damaged, truncated, or belongs to another program.

The service refuses to start within five seconds, with one line that names the file, and an exit
code. The file stays the same byte for byte, and no file appears beside it except the lock file.
"""

import asyncio
import os
import shutil
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path

import pytest

from afterward.engines.sqlite import database_file as sqlite_file
from afterward.engines.sqlite.engine import SQLite
from afterward.errors import CannotStart, QueueUnavailable
from tests.library.support import a_task, opened, put
from tests.support.service import COMMAND, PATIENCE, Process
from tests.support.torture import Tried, form

pytestmark = pytest.mark.anyio

PAGE = 4096
AT_MOST = form(PATIENCE, 5.0)  # seconds
TASKS = form(300, 5_000)


@pytest.fixture
def healthy(tmp_path: Path) -> bytes:
    """The bytes of a database with some tasks in it."""
    path = tmp_path / "healthy.db"

    async def make() -> None:
        async with opened(path) as engine:
            await put(engine, *(a_task() for _ in range(TASKS)))

    asyncio.run(make())
    return path.read_bytes()


def overwritten(data: bytes, page: int, garbage: bytes) -> bytes:
    """Replace one page of the file."""
    return data[: page * PAGE] + garbage + data[(page + 1) * PAGE :]


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "a corrupt page": lambda data: overwritten(data, len(data) // PAGE // 2, b"\xff" * PAGE),
    "another header": lambda data: b"Dear diary, once" + data[16:],
    "half of it": lambda data: data[: len(data) // 2 // PAGE * PAGE],
    "all but a byte": lambda data: data[:-1],
    "its first page": lambda data: data[:PAGE],
    "its first byte": lambda data: data[:1],
}


# The service as a command


@pytest.mark.parametrize(
    ("command", "damage"), [("serve", "a corrupt page"), ("worker", "another header")]
)
def test_the_service_refuses_to_start_on_a_damaged_database(
    tmp_path: Path, healthy: bytes, command: str, damage: str, tried: Tried
) -> None:
    path = tmp_path / "queue.db"
    path.write_bytes(data := DAMAGES[damage](healthy))
    began = time.monotonic()
    with Process(tmp_path, command=(*COMMAND, command)) as service:
        code = service.wait()
    seconds = time.monotonic() - began

    (line,) = (line for line in service.log.splitlines() if str(path) in line)
    tried(f"{command} on a file with {damage}", f"exit code {code} after {seconds:.1f} s")
    assert code != 0
    assert seconds < AT_MOST
    assert "It was left as it is." in line
    assert "Traceback" not in service.log
    assert_unchanged(path, data)


# The engine's check of the file


@pytest.mark.parametrize("damage", DAMAGES)
async def test_every_kind_of_damage_is_refused(tmp_path: Path, healthy: bytes, damage: str) -> None:
    path = tmp_path / "queue.db"
    path.write_bytes(DAMAGES[damage](healthy))
    await refusal(path)


async def test_damage_to_any_page_is_found(tmp_path: Path, healthy: bytes, tried: Tried) -> None:
    """Each page in turn is overwritten with ones, zeros and noise."""
    pages = len(healthy) // PAGE
    path = tmp_path / "queue.db"
    for page in range(pages):
        for garbage in (b"\xff" * PAGE, bytes(PAGE), os.urandom(PAGE)):
            path.write_bytes(overwritten(healthy, page, garbage))
            await refusal(path)
    tried(f"{pages} pages, each overwritten with ones, zeros and noise", "refused every time")


async def test_a_damaged_database_does_not_checkpoint_its_write_ahead_log(tmp_path: Path) -> None:
    """The WAL that a killed process left behind may hold intact data, so it must stay as well."""
    path = tmp_path / "var" / "queue.db"
    async with opened(path) as engine:
        await put(engine, *(a_task() for _ in range(TASKS)))
    async with opened(path) as engine:
        await put(engine, a_task())
        killed = Path(shutil.copytree(path.parent, tmp_path / "killed")) / path.name
    killed.write_bytes(DAMAGES["a corrupt page"](killed.read_bytes()))
    wal = killed.with_name(f"{killed.name}-wal")
    before = wal.read_bytes()
    assert before
    assert "damaged (Page" in await refusal(killed, wal.name, f"{killed.name}-shm")
    assert wal.read_bytes() == before


async def test_an_empty_file_is_a_new_database(tmp_path: Path) -> None:
    """A process that is killed at the very beginning of its first start leaves an empty file."""
    path = tmp_path / "queue.db"
    path.touch()
    async with opened(path) as engine:
        await put(engine, a_task())


async def test_a_file_that_is_not_a_database_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "diary.txt"
    path.write_text("Dear diary, " * 1000)
    assert "not a database" in await refusal(path)


@pytest.mark.parametrize("version", [0, sqlite_file.SCHEMA_VERSION])
async def test_a_database_of_another_program_is_refused(tmp_path: Path, version: int) -> None:
    path = tmp_path / "queue.db"
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE tasks (title TEXT)")
        connection.execute(f"PRAGMA user_version = {version}")
    assert "another program" in await refusal(path)


async def test_a_database_of_a_newer_version_is_refused(tmp_path: Path, healthy: bytes) -> None:
    path = tmp_path / "queue.db"
    path.write_bytes(healthy)
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA journal_mode = DELETE")
        connection.execute(f"PRAGMA user_version = {sqlite_file.SCHEMA_VERSION + 1}")
    assert "newer version" in await refusal(path)


async def refusal(path: Path, *beside: str) -> str:
    """Assert that an engine refuses to start on this file and leaves it unchanged.

    Return the error's message. `beside` names the files that were beside it before.
    """
    before = content(path)
    with pytest.raises(CannotStart) as raised:
        await SQLite(path).start()
    message = str(raised.value)
    assert str(path) in message
    assert "\n" not in message
    assert_unchanged(path, before, *beside)
    return message


def content(path: Path) -> bytes:
    return path.read_bytes()


def assert_unchanged(path: Path, data: bytes, *beside: str) -> None:
    assert content(path) == data
    files = {file.name for file in path.parent.glob(f"{path.name}*")}
    assert files == {path.name, f"{path.name}.lock", *beside}


async def test_control_without_the_check_the_engine_accepts_tasks_into_damaged_files(
    tmp_path: Path, healthy: bytes, monkeypatch: pytest.MonkeyPatch, tried: Tried
) -> None:
    monkeypatch.setattr(sqlite_file, "_check", lambda _: True)
    pages = len(healthy) // PAGE
    started = accepted = 0
    for page in range(pages):
        path = tmp_path / f"queue-{page}.db"
        path.write_bytes(overwritten(healthy, page, b"\xff" * PAGE))
        with suppress(CannotStart, QueueUnavailable):
            async with opened(path) as engine:
                started += 1
                await put(engine, a_task())
                accepted += 1
    tried(
        f"{pages} files with a damaged page each, without the check",
        f"{started} starts went on, {accepted} accepted a task",
    )
    assert started
    assert accepted
