"""The uploads' or the database's directory cannot be written, or somebody locks the database.

Requests that need it are answered 503 with Retry-After, never 500, and leave nothing behind. All
goes on by itself when that ends, and nothing that was accepted is lost. A start on a directory that
cannot be written is refused with one line.

Root is refused nothing, so as root the service runs without root's capabilities.
"""

import sqlite3
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path

import httpx2
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from afterward.engines.sqlite import database_file as sqlite_file
from afterward.engines.sqlite.engine import SQLite
from afterward.errors import CannotStart, QueueUnavailable
from tests.library.support import a_task, claim_all, opened, put
from tests.support.disks import UNPRIVILEGED, read_only
from tests.support.service import COMMAND, PATIENCE, Process, Service, files_below, until
from tests.support.torture import Tried, form

TIMES = form(1, 20)
AS_ANYBODY = (*UNPRIVILEGED, *COMMAND)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """One for all of these tests: each leaves it well again."""
    with Service(
        tmp_path_factory.mktemp("service"),
        command=AS_ANYBODY,
        retry_max_seconds=0.5,
    ) as service:
        yield service


def mail_to(service: Service) -> httpx2.Response:
    return service.post("/send-notification/ada@example.com")


def upload_to(service: Service) -> httpx2.Response:
    return service.post("/upload", files={"file": ("a.txt", b"Hello")})


def assert_unavailable(answer: httpx2.Response) -> None:
    assert answer.status_code == 503
    assert answer.headers["content-type"] == "application/problem+json"
    assert int(answer.headers["retry-after"]) > 0


def becomes_ready_as(service: Service, checks: dict[str, str]) -> None:
    """Wait until /readyz says so: it remembers for a second what it said before."""
    until(lambda: service.get("/readyz").json()["checks"] == checks, within=PATIENCE)


# Read-only


def test_uploads_are_refused_while_their_directory_is_read_only(
    service: Service, tried: Tried
) -> None:
    """Mail is not; and an upload that came before is published as soon as it can be."""
    uploads = service.directory / "uploads"
    kept = upload_to(service).json()
    service.wait_for(kept["id"])
    for _ in range(TIMES):
        with read_only(uploads):
            assert_unavailable(upload_to(service))
            becomes_ready_as(service, {"database": "ok", "uploads": "failing", "smtp": "ok"})
            content = service.get(f"/uploads/{kept['upload']['id']}/content")
            assert content.content == b"Hello"
            service.wait_for(mail_to(service).json()["id"])
        becomes_ready_as(service, {"database": "ok", "uploads": "ok", "smtp": "ok"})
        service.wait_for(upload_to(service).raise_for_status().json()["id"])
    tried(f"uploads read-only {TIMES} times", f"{TIMES} times 503, and nothing left of it")
    assert [path.split("/")[0] for path in files_below(uploads)] == ["published"] * (TIMES + 1)


def test_an_upload_that_was_accepted_is_published_when_that_is_possible_again(
    service: Service,
) -> None:
    """Its task meets the trouble, and is tried again."""
    uploads = service.directory / "uploads"
    service.wait_for(upload_to(service).json()["id"])  # by now there are all directories
    with read_only(uploads / "published"):
        task = upload_to(service).raise_for_status().json()
        until(lambda: service.get(f"/tasks/{task['id']}").json()["attempts"] > 1, within=PATIENCE)
    service.wait_for(task["id"])


def test_a_running_service_keeps_its_database_and_the_next_one_does_not_start(
    service: Service, tmp_path: Path, tried: Tried
) -> None:
    """The database's files are open, so what becomes of their directory is of no interest."""
    database = service.directory / "queue.db"
    with read_only(service.directory, but=service.directory / "inbox"):
        for _ in range(5):
            service.wait_for(mail_to(service).raise_for_status().json()["id"])
    service.stop()
    with (
        read_only(service.directory),
        Process(tmp_path, command=AS_ANYBODY, queue_url=f"sqlite:///{database}") as refused,
    ):
        code = refused.wait()
    (line,) = (line for line in refused.log.splitlines() if str(database) in line)
    tried("the database's directory read-only", f"5 of 5 sent; the next start: exit code {code}")
    assert code != 0
    assert "cannot be the queue's database" in line
    assert "Traceback" not in refused.log
    service.start()
    service.wait_for(mail_to(service).raise_for_status().json()["id"])


# Locked


@contextmanager
def locked(path: Path, how: str = "EXCLUSIVE") -> Iterator[None]:
    """Somebody else's connection, which knows nothing of our lock file."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute(f"BEGIN {how}")
        yield
        connection.execute("ROLLBACK")


def test_a_locked_database_is_unavailable_and_then_goes_on(service: Service, tried: Tried) -> None:
    accepted, answers, seconds = list[str](), list[httpx2.Response](), list[float]()
    files = files_below(service.directory / "uploads")
    with ThreadPoolExecutor(8) as clients:
        for _ in range(TIMES):
            accepted += [mail_to(service).raise_for_status().json()["id"] for _ in range(8)]
            with locked(service.directory / "queue.db"):
                asked = [clients.submit(mail_to, service) for _ in range(4)]
                asked += [clients.submit(upload_to, service)]
                asked += [clients.submit(service.get, path) for path in ("/tasks", "/metrics")]
                assert service.get("/livez").status_code == 200
                answers += [answer.result() for answer in asked]
                becomes_ready_as(service, {"database": "failing", "uploads": "ok", "smtp": "ok"})
            began = time.monotonic()
            assert mail_to(service).status_code == 202
            for task_id in accepted[-8:]:
                service.wait_for(task_id)
            seconds.append(time.monotonic() - began)

    for answer in answers:
        assert_unavailable(answer)
    tried(
        f"locked {TIMES} times, {len(accepted)} accepted before, {len(answers)} asked meanwhile",
        f"503 to all of these, 0 lost; all well {max(seconds):.1f} s after it at most",
    )
    assert files_below(service.directory / "uploads") == files


@pytest.fixture
def short_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait less long for somebody else's lock than the service does."""
    assert sqlite_file.LOCKED_SECONDS <= 1
    monkeypatch.setattr(sqlite_file, "LOCKED_SECONDS", 0.1)


@pytest.mark.anyio
@pytest.mark.usefixtures("short_patience")
@pytest.mark.parametrize("how", ["IMMEDIATE", "EXCLUSIVE"])
async def test_an_engine_says_that_it_is_locked(tmp_path: Path, how: str) -> None:
    path = tmp_path / "queue.db"
    async with opened(path) as engine:
        with locked(path, how):
            with pytest.raises(QueueUnavailable) as raised:
                await put(engine, a_task())
            assert "locked" in str(raised.value.__cause__)
            with pytest.raises(QueueUnavailable):
                await engine.check()
        await put(engine, a_task())
        assert len(await claim_all(engine)) == 1
    with locked(path, how), pytest.raises(CannotStart, match="locked"):
        await SQLite(path).start()


# The control


def test_control_a_plain_route_answers_500(tmp_path: Path, tried: Tried) -> None:
    """One that writes to SQLite as it finds it."""
    path = tmp_path / "plain.db"
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE mails (address TEXT)")
    app = FastAPI()

    @app.post("/send-notification/{email}", status_code=202)
    def send_notification(email: str) -> None:
        with closing(sqlite3.connect(path, timeout=0.1)) as connection, connection:
            connection.execute("INSERT INTO mails VALUES (?)", (email,))

    client = TestClient(app, raise_server_exceptions=False)
    assert client.post("/send-notification/ada@example.com").status_code == 202
    with locked(path):
        answer = client.post("/send-notification/ada@example.com")
    tried("locked, a plain route with sqlite3", str(answer.status_code))
    assert answer.status_code == 500
