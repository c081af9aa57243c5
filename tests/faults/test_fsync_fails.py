"""fsync fails with EIO: injected by libfiu in the service's process, and on a disk that fails.

The service answers 503 and not 202, and /readyz names the failing part. When the fault ends, the
service recovers by itself. After a failed fsync, Linux marks the pages in its page cache as clean,
although they are not on the disk. So the tests finally cut the power: everything that was answered
202, before or after the fault, must be on the disk.
"""

import errno
import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest

from afterward.engines.sqlite.engine import SQLite
from afterward.errors import QueueUnavailable
from tests.support.power import Disk, inspect_database, settings_on
from tests.support.service import COMMAND, PATIENCE, Service, until
from tests.support.tools import tool
from tests.support.torture import Tried, form

POSTS = form(10, 200)
TIMES = form(1, 20)
WEAKENED = (sys.executable, "-m", "tests.support.weakened_durability")


@pytest.mark.parametrize(
    ("call", "failing"), [("fdatasync", "database"), ("fsync", "uploads")], ids=["rows", "files"]
)
def test_no_request_is_answered_202_while_fsync_fails(
    tmp_path: Path, tried: Tried, call: str, failing: str
) -> None:
    """SQLite calls fdatasync, and the upload store calls fsync."""
    post = send if failing == "database" else upload
    with Service(tmp_path, command=under_libfiu(tmp_path)) as service:
        accepted = [post(service).raise_for_status().json()["id"]]
        service.wait_for(accepted[0])  # so that no other task can fail
        with failing_with_eio(tmp_path, service, call):
            answers = [post(service) for _ in range(POSTS)]
            readiness = service.get("/readyz")
        until(lambda: service.get("/readyz").is_success, within=PATIENCE)
        accepted += [post(service).raise_for_status().json()["id"] for _ in range(POSTS)]
        for task_id in accepted:
            service.wait_for(task_id)
        listed = service.get("/tasks", params={"limit": 100}).json()["data"]

    refused = sum(answer.status_code == httpx2.codes.SERVICE_UNAVAILABLE for answer in answers)
    tried(f"{len(answers)} POSTs while {call} fails", f"{refused} answered 503, and not ready")
    assert refused == len(answers)
    assert all(int(answer.headers["Retry-After"]) > 0 for answer in answers)
    assert readiness.status_code == httpx2.codes.SERVICE_UNAVAILABLE
    assert readiness.json()["checks"][failing] == "failing"
    assert {task["id"] for task in listed} <= set(accepted)  # no refused task was stored


def test_control_with_synchronous_normal_requests_are_answered_202_while_fsync_fails(
    tmp_path: Path, tried: Tried
) -> None:
    """With synchronous = NORMAL, SQLite does not call fdatasync at a commit, so it cannot fail."""
    command = under_libfiu(tmp_path, WEAKENED)
    with (
        Service(tmp_path, command=command, without="fsync of commits") as service,
        failing_with_eio(tmp_path, service, "fdatasync"),
    ):
        answers = [send(service).status_code for _ in range(POSTS)]

    accepted = answers.count(httpx2.codes.ACCEPTED)
    tried(f"synchronous = NORMAL: {POSTS} POSTs", f"{accepted} answered 202 nevertheless")
    assert accepted == POSTS


@pytest.mark.parametrize("restarted", [False, True], ids=["goes on", "is started again"])
def test_tasks_accepted_after_a_failed_fsync_are_on_the_disk(
    tmp_path: Path, tried: Tried, restarted: bool
) -> None:
    """SQLite must not append to its WAL behind pages that never reached the disk."""
    rows = 0
    for number in range(TIMES):
        verdict, accepted, lost = fail_mend_and_cut(
            tmp_path / str(number), COMMAND, restarted=restarted
        )
        assert verdict == "ok"
        assert lost == set()
        rows += len(accepted)
    what = "then started again" if restarted else "and the service went on"
    tried(f"{TIMES} times failed, {what}: {rows:,} rows answered 202", "0 lost, integrity ok")


@pytest.mark.anyio
async def test_after_a_failed_fsync_the_wal_is_dropped_from_the_page_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This needs no disk of its own, so it also runs where the test may not mount."""
    forgotten = list[str]()

    def forget(descriptor: int, *_: int) -> None:
        forgotten.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)

    def fail(_: sqlite3.Connection) -> None:
        error = sqlite3.OperationalError("disk I/O error")
        error.sqlite_errorcode = sqlite3.SQLITE_IOERR_FSYNC
        raise error

    engine = SQLite(tmp_path / "queue.db")
    await engine.start()
    monkeypatch.setattr(os, "posix_fadvise", forget)
    with pytest.raises(QueueUnavailable):
        await engine._commits.run(fail)
    await engine.stop()
    assert forgotten == ["queue.db-wal"]


def test_control_with_the_page_cache_kept_accepted_tasks_are_lost(
    tmp_path: Path, tried: Tried
) -> None:
    """SQLite alone reads the failed pages from the cache, and appends behind them."""
    verdict, accepted, lost = fail_mend_and_cut(
        tmp_path / "disk", WEAKENED, restarted=True, without="doubt"
    )

    tried(
        "the page cache kept",
        f"{len(lost)} of {len(accepted)} rows lost, integrity: {verdict[:20]}",
    )
    assert lost


def fail_mend_and_cut(
    directory: Path, command: tuple[str, ...], *, restarted: bool, **settings: Any
) -> tuple[str, set[str], set[str]]:
    """Make a disk fail, repair it, and cut its power.

    Return SQLite's integrity verdict, the accepted tasks, and the lost tasks.
    """
    directory.mkdir()
    accepted = set[str]()
    with (
        Disk(directory, megabytes=64) as disk,
        Service(
            directory, command=command, **settings_on(disk), worker_concurrency=0, **settings
        ) as service,
    ):
        accepted |= send_until(service, httpx2.codes.ACCEPTED)
        disk.fail()
        accepted |= send_until(service, httpx2.codes.SERVICE_UNAVAILABLE)
        if restarted:
            service.kill()
        disk.mend()
        if restarted:
            service.start()
        for _ in range(10):
            accepted |= send_until(service, httpx2.codes.ACCEPTED)
        disk.cut()
        service.kill()
        disk.power_on()
        verdict, tasks, _ = inspect_database(disk)
        return verdict, accepted, accepted - tasks


def send_until(service: Service, status: int) -> set[str]:
    """Send until an answer has this status; return the accepted tasks."""
    accepted = set[str]()

    def answered() -> bool:
        answer = send(service)
        if answer.status_code == httpx2.codes.ACCEPTED:
            accepted.add(answer.json()["id"])
        return answer.status_code == status

    until(answered, within=30, what=status)
    return accepted


def send(service: Service) -> httpx2.Response:
    return service.post("/send-notification/ada@example.com", json={"message": "x" * 5_000})


def upload(service: Service) -> httpx2.Response:
    return service.post("/upload", files={"file": ("file.bin", bytes(5_000))})


def under_libfiu(directory: Path, command: tuple[str, ...] = COMMAND) -> tuple[str, ...]:
    """Return a command that runs `command` with libfiu, which can make its system calls fail."""
    return (tool("fiu-run"), "-x", "-f", str(directory / "fiu"), *command)


@contextmanager
def failing_with_eio(directory: Path, service: Service, call: str) -> Iterator[None]:
    """Make fsync or fdatasync fail with EIO in the service's process."""
    point = f"name=posix/io/sync/{call}"
    control = (tool("fiu-ctrl"), "-f", str(directory / "fiu"))
    subprocess.run(
        [*control, "-c", f"enable {point},failinfo={errno.EIO}", str(service.pid)], check=True
    )
    yield
    subprocess.run([*control, "-c", f"disable {point}", str(service.pid)], check=True)
