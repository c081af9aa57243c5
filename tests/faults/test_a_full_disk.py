"""The disk with the database, uploads and log fills up, and later has room again.

While the disk is full, the service refuses requests that it cannot store (507, or 503), and leaves
no partial files. Accepted tasks and uploads can be read. The worker claims nothing, and does not
spin. Once there is room, the service recovers by itself within ten seconds, and no accepted task is
lost.

The disk is a small tmpfs where the test may mount it, and otherwise a limit on file sizes.
"""

import asyncio
import os
import re
import resource
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from fastapi import BackgroundTasks, FastAPI, UploadFile
from fastapi.testclient import TestClient

from afterward.engines.sqlite.engine import SQLite
from afterward.errors import DiskFull
from app.tasks.log_file import LogFile
from tests.library.support import a_task, claim_one, opened, put
from tests.support.disks import Disk, LimitedFiles, SmallDisk, small_disk
from tests.support.measures import cpu_share
from tests.support.service import PATIENCE, Service, files_below, until
from tests.support.smtp_server import SmtpServer
from tests.support.torture import LONG, Tried, form

CYCLES = form(1, 20)
MAILS = 12
AT_ONCE = 4  # tasks that run at the same time
FULL_SECONDS = form(0.5, 3.0)
AT_MOST = form(PATIENCE, 10.0)  # seconds until the service has recovered
CONTENT = os.urandom(100_000)

MESSAGE_ID = re.compile(rb"Message-ID: <([^@]+)@")


@pytest.fixture(params=["tmpfs", "RLIMIT_FSIZE"] if LONG else ["tmpfs"])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Disk]:
    with small_disk(tmp_path / "disk") as small:
        if small is not None and request.param == "tmpfs":
            yield small
        else:
            yield LimitedFiles(tmp_path)


def test_a_full_disk_refuses_new_requests_and_loses_no_accepted_task(
    disk: Disk, smtp_server: SmtpServer, tried: Tried
) -> None:
    smtp_server.delay["dot"] = 0.1  # so that some tasks run when the disk fills up
    accepted = list[str]()
    seconds = list[float]()
    with Service(
        disk.directory / "service",
        catcher=False,
        smtp_port=smtp_server.port,
        worker_concurrency=AT_ONCE,
    ) as service:
        for _ in range(CYCLES):
            tasks = [mail_to(service).raise_for_status().json()["id"] for _ in range(MAILS)]
            upload = upload_to(service).raise_for_status().json()
            disk.fill(service.pid)
            sent = len(smtp_server.received)
            while (answer := mail_to(service)).status_code == 202:
                tasks.append(answer.json()["id"])  # the database had a little room left

            for refused in (answer, *(mail_to(service) for _ in range(5)), upload_to(service)):
                assert_refused(refused)
            assert_readable(service, disk, tasks[-1], upload["upload"]["id"])
            assert files_below(service.directory / "uploads/incoming") == []
            assert cpu_share(service.pid, FULL_SECONDS) < 0.5
            assert len(smtp_server.received) <= sent + AT_ONCE

            disk.free(service.pid)
            seconds.append(back_to_normal(service, [*tasks, upload["id"]]))
            content = f"/uploads/{upload['upload']['id']}"
            assert service.get(f"{content}/content").content == CONTENT
            service.client.delete(content)
            accepted += tasks
        until(lambda: files_below(service.directory / "uploads") == [], within=PATIENCE)

    delivered = sorted(MESSAGE_ID.findall(b"".join(m.content for m in smtp_server.received)))
    tried(
        f"{disk.name} full {CYCLES} times with {len(accepted)} mails and {CYCLES} uploads accepted",
        f"{len(accepted) - len(set(delivered))} lost, "
        f"all done {max(seconds):.1f} s after there was room, at most",
    )
    assert delivered == sorted(task_id.encode() for task_id in accepted)


def mail_to(service: Service) -> httpx2.Response:
    return service.post("/send-notification/ada@example.com?q=hello")


def upload_to(service: Service) -> httpx2.Response:
    return service.post("/upload", files={"file": ("a.bin", CONTENT)})


def assert_refused(answer: httpx2.Response) -> None:
    assert answer.status_code in {503, 507}
    assert answer.headers["content-type"] == "application/problem+json"
    assert int(answer.headers["retry-after"]) > 0


def assert_readable(service: Service, disk: Disk, task_id: str, upload_id: str) -> None:
    """Assert that every read is answered, that the service is alive, and that it is not ready."""
    # SQLite reports a write beyond RLIMIT_FSIZE as an I/O error. After an I/O error the contents
    # of the page cache are in doubt, so the service may refuse reads as well.
    expected = {200} if isinstance(disk, SmallDisk) else {200, 503}
    for path in ("/tasks", f"/tasks/{task_id}", "/uploads", f"/uploads/{upload_id}"):
        assert service.get(path).status_code in expected, path
    assert service.get("/livez").status_code == 200
    until(lambda: service.get("/readyz").status_code == 503, within=AT_MOST)


def back_to_normal(service: Service, tasks: list[str]) -> float:
    """Wait until these tasks are done and the service is ready; return the seconds that took."""
    began = time.monotonic()
    for task_id in tasks:
        service.wait_for(task_id, at_most=began + AT_MOST - time.monotonic())
    until(lambda: service.get("/readyz").status_code == 200, within=AT_MOST)
    return time.monotonic() - began


# The log file


def test_a_truncated_log_line_does_not_run_into_the_next_line(tmp_path: Path) -> None:
    log_file = LogFile(tmp_path / "log.txt")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8, before[1]))
    try:
        for _ in range(2):
            with pytest.raises(OSError, match=r"No space|too large"):
                log_file.append("the first line")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    log_file.append("the second line")
    assert (tmp_path / "log.txt").read_text() == "the firs\nthe second line\n"


# The database


@pytest.mark.anyio
async def test_a_full_database_refuses_writes_and_serves_reads(tmp_path: Path) -> None:
    """A write and a read come at the same time, so the group commit puts them together."""
    large = a_task(arguments="x" * 100_000)
    async with opened(tmp_path / "queue.db") as engine:
        await limit_pages(engine, at_most=1)  # SQLite reports this limit exactly like a full disk
        refused, read = await asyncio.gather(
            put(engine, large), engine.backlog(), return_exceptions=True
        )
        assert isinstance(refused, DiskFull)
        assert "disk is full; nothing was accepted" in str(refused)
        assert not isinstance(read, BaseException)
        await limit_pages(engine, at_most=1_000_000)
        await put(engine, large)
        assert (await claim_one(engine)).id == large.id


async def limit_pages(engine: SQLite, *, at_most: int) -> None:
    await engine._commits.run(lambda db: db.execute(f"PRAGMA max_page_count = {at_most}") and None)


# The negative control


def test_control_a_file_written_after_the_202_is_lost(disk: Disk, tried: Tried) -> None:
    """Tutorials write an upload with BackgroundTasks, after the 202."""
    kept = disk.directory / "kept.bin"
    app = FastAPI()

    @app.post("/upload", status_code=202)
    async def upload(file: UploadFile, background_tasks: BackgroundTasks) -> None:
        background_tasks.add_task(kept.write_bytes, await file.read())

    client = TestClient(app, raise_server_exceptions=False)
    disk.fill(os.getpid())
    try:
        answer = client.post("/upload", files={"file": ("a.bin", CONTENT)})
    finally:
        disk.free(os.getpid())
    size = kept.stat().st_size
    tried(f"{disk.name} full, an upload with plain BackgroundTasks", f"202, {size} bytes kept")
    assert answer.status_code == 202
    assert size < len(CONTENT)
