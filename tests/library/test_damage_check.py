"""The check in the background: its time limits, its stop, and errors that are no damage."""

import errno
import sqlite3
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from structlog.testing import capture_logs

from afterward.engines.sqlite import damage_check
from afterward.engines.sqlite import engine as sqlite_engine
from afterward.engines.sqlite.damage_check import BackgroundCheck
from afterward.engines.sqlite.engine import SQLite
from afterward.errors import QueueDamaged
from afterward.task import Status
from tests.library.support import a_task, opened, put
from tests.support.damage import leave_the_check_to_the_background
from tests.support.service import PATIENCE, until

pytestmark = pytest.mark.anyio

ENDLESS = """
WITH RECURSIVE n(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM n) SELECT n FROM n WHERE n < 0
"""


@pytest.fixture
async def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[SQLite]:
    """An engine with a sound file, which checks nothing by itself."""
    leave_the_check_to_the_background(monkeypatch)
    async with opened(tmp_path / "queue.db") as engine:
        await put(engine, a_task())
        yield engine


@pytest.fixture
def check(engine: SQLite) -> BackgroundCheck:
    """A check of that file."""
    return BackgroundCheck(engine._path, print)


async def test_an_interrupted_check_is_repeated_with_a_longer_limit(
    check: BackgroundCheck, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits: list[float] = []

    def interrupt(_: object, *, at_most: float) -> bool:
        limits.append(at_most)
        return len(limits) == 3

    monkeypatch.setattr(BackgroundCheck, "_check", interrupt)
    check.start()
    check._thread.join()
    assert limits == [0.05, 0.1, 0.2]


async def test_a_check_ends_in_time(
    check: BackgroundCheck, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(damage_check, "QUICK_CHECK", ENDLESS)
    began = time.monotonic()
    assert not check._check(at_most=0.1)
    assert 0.1 <= time.monotonic() - began < PATIENCE


async def test_a_check_ends_when_the_wal_has_grown(
    engine: SQLite, check: BackgroundCheck, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(damage_check, "LONGEST_WAL_GROWTH", 4096)
    thread = endless_check(check, monkeypatch)
    while thread.is_alive():
        await put(engine, a_task())
    thread.join()


async def test_a_stop_interrupts_the_check(
    check: BackgroundCheck, monkeypatch: pytest.MonkeyPatch
) -> None:
    thread = endless_check(check, monkeypatch)
    check._stopping.set()
    thread.join(PATIENCE)
    assert not thread.is_alive()


def endless_check(check: BackgroundCheck, monkeypatch: pytest.MonkeyPatch) -> threading.Thread:
    """Begin a check that does not end by itself."""
    monkeypatch.setattr(damage_check, "QUICK_CHECK", ENDLESS)
    thread = threading.Thread(target=lambda: check._check(at_most=1e9), daemon=True)
    thread.start()
    return thread


async def test_a_stop_ends_the_pause_before_a_check(
    check: BackgroundCheck, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(damage_check, "FIRST_SECONDS", 1e6)
    check.start()
    check.stop()
    assert not check._thread.is_alive()


async def test_a_stop_does_not_wait_for_a_disk_that_hangs(
    check: BackgroundCheck, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk, reads = threading.Event(), threading.Event()

    def hang(*_: object, **__: object) -> bool:
        reads.set()
        return disk.wait()

    monkeypatch.setattr(BackgroundCheck, "_check", hang)
    monkeypatch.setattr(damage_check, "STOP_SECONDS", 0.05)
    check.start()
    reads.wait()
    check.stop()
    assert check._thread.is_alive()
    disk.set()
    check._thread.join()


async def test_an_error_that_is_no_damage_puts_the_check_off(
    check: BackgroundCheck, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect, errors = sqlite3.connect, iter([sqlite3.OperationalError("unable to open")])

    def fail_once(*arguments: object, **options: object) -> sqlite3.Connection:
        for error in errors:
            raise error
        return connect(*arguments, **options)  # type: ignore[call-overload, no-any-return]

    monkeypatch.setattr(sqlite3, "connect", fail_once)
    with capture_logs() as lines:
        check.start()
        until(lambda: lines and lines[-1]["event"] == "database checked", within=PATIENCE)
    assert "database check put off" in [line["event"] for line in lines]


async def test_a_check_that_fails_in_another_way_is_repeated_even_if_the_log_fails(
    check: BackgroundCheck, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For example, the disk of the log is full, and the system allows no more threads."""
    outcomes: list[Exception | bool] = [RuntimeError("can't start new thread"), True]

    def check_file(_: object, *, at_most: float) -> bool:
        outcome = outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(BackgroundCheck, "_check", check_file)
    monkeypatch.setattr(damage_check, "log", SimpleNamespace(info=fail, warning=fail))
    check.start()
    check._thread.join(PATIENCE)
    assert outcomes == []


async def test_a_file_behind_a_symbolic_link_is_checked(
    engine: SQLite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SQLite puts the WAL beside the file that the link leads to."""
    link = tmp_path / "link.db"
    link.symlink_to(engine._path)
    linked = BackgroundCheck(link, print)
    assert linked._wal_size() > 0
    assert linked._check(at_most=PATIENCE)
    assert BackgroundCheck(tmp_path / "missing.db", print)._wal_size() == 0


async def test_damage_is_reported_even_if_the_log_fails(
    engine: SQLite, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the thread of the commits would end, and every caller would wait for ever."""

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def meet_damage(_: sqlite3.Connection) -> None:
        error = sqlite3.DatabaseError("database disk image is malformed")
        error.sqlite_errorcode = sqlite3.SQLITE_CORRUPT
        raise error

    monkeypatch.setattr(sqlite_engine, "log", SimpleNamespace(error=fail))
    with pytest.raises(QueueDamaged):
        await engine._commits.run(meet_damage)
    assert (await engine.backlog()).counts[Status.QUEUED] == 1
    with pytest.raises(QueueDamaged):
        await put(engine, a_task())


async def test_a_start_without_a_thread_for_the_check_leaves_nothing_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(path := tmp_path / "queue.db") as engine:
        await put(engine, a_task())
    leave_the_check_to_the_background(monkeypatch)

    def fail(_: object) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(BackgroundCheck, "start", fail)
        with pytest.raises(RuntimeError, match="new thread"):
            await SQLite(path).start()
    async with opened(path):
        pass


def test_a_check_that_fails_by_itself_is_no_verdict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(damage_check, "QUICK_CHECK", "SELECT * FROM nowhere")
    connection = sqlite3.connect(tmp_path / "any.db")
    with pytest.raises(sqlite3.OperationalError, match="nowhere"):
        damage_check.check_pages(connection, lambda: False)
    connection.close()
