"""strace records the service's system calls while many clients send and upload.

Before a 202 is written to its socket, the row is written to the WAL, and then an fdatasync of the
WAL begins and ends. For an upload, four steps come before its row: the file is written, synced and
renamed, and then its directory is synced.
"""

import re
import sys
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from afterward.engines.sqlite.database_file import open_database
from tests.support.service import COMMAND, Service, until
from tests.support.torture import Tried, form
from tests.support.traced import Call, calls, strace

MAILS = form(40, 2_000)
UPLOADS = form(12, 400)
CLIENTS = 8
WEAKENED = (sys.executable, "-m", "tests.support.weakened_durability")

_ID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")


def test_rows_and_files_are_synced_before_each_202(tmp_path: Path, tried: Tried) -> None:
    mails, uploads, order = traced(tmp_path, COMMAND)

    kept = [order.row_is_kept(task) for task in mails + list(uploads)]
    files_kept = [order.file_is_kept(task, upload) for task, upload in uploads.items()]
    tried(f"{len(kept)} answers of 202, traced", f"{sum(kept)} after the fdatasync of their row")
    tried(f"{len(files_kept)} uploads", f"{sum(files_kept)} synced in order before their row")
    assert len(kept) == MAILS + UPLOADS
    assert all(kept)
    assert all(files_kept)


def test_sqlite_waits_for_the_disk_at_each_commit(tmp_path: Path) -> None:
    """This runs without strace. 2 is FULL: SQLite syncs the WAL before COMMIT returns."""
    with closing(open_database(tmp_path / "queue.db")) as database:
        assert database.execute("PRAGMA synchronous").fetchone() == (2,)
        assert database.execute("PRAGMA journal_mode").fetchone() == ("wal",)


@pytest.mark.parametrize("without", ["fsync of commits", "fsync of files", "fsync of folders"])
def test_control_a_missing_sync_is_detected(tmp_path: Path, tried: Tried, without: str) -> None:
    mails, uploads, order = traced(tmp_path, WEAKENED, without=without)

    if without == "fsync of commits":
        kept = [order.row_is_kept(task) for task in mails]
    else:
        kept = [order.file_is_kept(task, upload) for task, upload in uploads.items()]
    tried(f"without {without}", f"{len(kept) - sum(kept)} of {len(kept)} out of order")
    # The sync for another request may come just in time, so not every request is out of order.
    assert sum(kept) < len(kept) / 2


class Order:
    """Checks the order of writes, syncs and renames in a trace."""

    def __init__(self, trace: list[Call]) -> None:
        self._syncs = [call for call in trace if call.name in {"fsync", "fdatasync"}]
        self._writes = [call for call in trace if call.name == "write"]
        self._with_id = defaultdict[str, list[Call]](list)
        for call in trace:
            for found in set(_ID.findall(call.arguments)):
                self._with_id[found].append(call)

    def row_is_kept(self, task_id: str) -> bool:
        """Return whether the row was synced before the 202 was written to the socket."""
        written = self._first(task_id, "pwrite64", "-wal>")
        synced = self._synced(written, "-wal>")
        return synced < self._first(task_id, "write", "HTTP/1.1 202").began

    def file_is_kept(self, task_id: str, upload_id: str) -> bool:
        """Return whether the file, then its name and its directory were synced before the row."""
        renamed = self._first(upload_id, "rename", "/received/")
        incoming = renamed.arguments.split('"')[1]
        written = [call for call in self._writes if f"{incoming}>" in call][-1]
        file_synced = self._synced(written, f"{incoming}>")
        folder_synced = self._synced(renamed, "/received>")
        row = self._first(task_id, "pwrite64", "-wal>")
        return file_synced < renamed.began and folder_synced < row.began

    def _first(self, found: str, name: str, text: str) -> Call:
        return next(call for call in self._with_id[found] if call.name == name and text in call)

    def _synced(self, written: Call, path: str) -> float:
        """Return the end of the first sync of this path that began after the call, or infinity."""
        later = (call.ended for call in self._syncs if call.began > written.ended and path in call)
        return next(later, float("inf"))


def traced(
    directory: Path, command: tuple[str, ...], **settings: Any
) -> tuple[list[str], dict[str, str], Order]:
    """Send and upload under strace.

    Return the task ids of the mails, the upload ids by task id, and the order of the system calls.
    """
    trace = directory / "trace"
    with (
        Service(
            directory,
            command=strace(command, trace),
            catcher=False,
            worker_concurrency=0,
            **settings,
        ) as service,
        ThreadPoolExecutor(CLIENTS) as clients,
    ):

        def send(number: int) -> str:
            answer = service.post(f"/send-notification/user{number}@example.com")
            return str(answer.raise_for_status().json()["id"])

        def upload(number: int) -> tuple[str, str]:
            answer = service.post("/upload", files={"file": ("file.bin", bytes(3_000 * number))})
            return answer.raise_for_status().json()["id"], answer.json()["upload"]["id"]

        uploads = clients.map(upload, range(1, UPLOADS + 1))
        mails = list(clients.map(send, range(MAILS)))
        files = dict(uploads)
        service.kill()
        until(lambda: ended(trace, service.pid), within=30)
    return mails, files, Order(list(calls(trace.read_text())))


def ended(trace: Path, pid: int) -> bool:
    """Return whether strace has recorded the end of the process."""
    return re.search(rf"^{pid} +\+\+\+", trace.read_text()[-10_000:], re.MULTILINE) is not None
