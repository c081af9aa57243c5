"""The directory of the uploads or the database is read-only, or another program locks the database.

The service answers such requests 503 with Retry-After, never 500, and leaves no partial files.
When the fault ends, it recovers by itself, and no accepted task is lost. It refuses to start on a
read-only directory, with one line.

File permissions do not bind root. So a test that runs as root starts the service without root's
capabilities.
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
WITHOUT_CAPABILITIES = (*UNPRIVILEGED, *COMMAND)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service for all tests of this module. Each test undoes its fault."""
    with Service(
        tmp_path_factory.mktemp("service"),
        command=WITHOUT_CAPABILITIES,
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


def wait_for_checks(service: Service, checks: dict[str, str]) -> None:
    """Wait until /readyz reports these checks. It caches its answer for a second."""
    until(lambda: service.get("/readyz").json()["checks"] == checks, within=PATIENCE)


# Read-only


def test_uploads_are_refused_while_their_directory_is_read_only(
    service: Service, tried: Tried
) -> None:
    """Mail is accepted meanwhile, and an earlier upload can still be downloaded."""
    uploads = service.directory / "uploads"
    kept = upload_to(service).json()
    service.wait_for(kept["id"])
    for _ in range(TIMES):
        with read_only(uploads):
            assert_unavailable(upload_to(service))
            wait_for_checks(service, {"database": "ok", "uploads": "failing", "smtp": "ok"})
            content = service.get(f"/uploads/{kept['upload']['id']}/content")
            assert content.content == b"Hello"
            service.wait_for(mail_to(service).json()["id"])
        wait_for_checks(service, {"database": "ok", "uploads": "ok", "smtp": "ok"})
        service.wait_for(upload_to(service).raise_for_status().json()["id"])
    tried(f"uploads read-only {TIMES} times", f"{TIMES} times 503, and nothing left of it")
    assert [path.split("/")[0] for path in files_below(uploads)] == ["published"] * (TIMES + 1)


def test_an_accepted_upload_is_published_after_its_directory_is_writable_again(
    service: Service,
) -> None:
    """Its task fails in the read-only directory, and is retried."""
    uploads = service.directory / "uploads"
    service.wait_for(upload_to(service).json()["id"])  # creates all directories
    with read_only(uploads / "published"):
        task = upload_to(service).raise_for_status().json()
        until(lambda: service.get(f"/tasks/{task['id']}").json()["attempts"] > 1, within=PATIENCE)
    service.wait_for(task["id"])


def test_a_read_only_database_directory_stops_no_running_service_but_prevents_a_start(
    service: Service, tmp_path: Path, tried: Tried
) -> None:
    """A running service has the database's files open, so it does not need their directory."""
    database = service.directory / "queue.db"
    with read_only(service.directory, but=service.directory / "inbox"):
        for _ in range(5):
            service.wait_for(mail_to(service).raise_for_status().json()["id"])
    service.stop()
    with (
        read_only(service.directory),
        Process(
            tmp_path, command=WITHOUT_CAPABILITIES, queue_url=f"sqlite:///{database}"
        ) as refused,
    ):
        code = refused.wait()
    (line,) = (line for line in refused.log.splitlines() if str(database) in line)
    tried("the database's directory read-only", f"5 of 5 sent; the next start: exit code {code}")
    assert code != 0
    assert "cannot be the queue's database" in line
    assert "Traceback" not in refused.log
    service.start()
    service.wait_for(mail_to(service).raise_for_status().json()["id"])


# Locked by another program


@contextmanager
def locked(path: Path, how: str = "EXCLUSIVE") -> Iterator[None]:
    """Lock the database with a connection of another program, which ignores the lock file."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute(f"BEGIN {how}")
        yield
        connection.execute("ROLLBACK")


def test_requests_during_a_lock_are_answered_503_and_the_service_recovers(
    service: Service, tried: Tried
) -> None:
    """Lists are answered all the same, because in WAL mode a lock stops only writers."""
    accepted, answers, seconds = list[str](), list[httpx2.Response](), list[float]()
    files = files_below(service.directory / "uploads")
    with ThreadPoolExecutor(8) as clients:
        for _ in range(TIMES):
            accepted += [mail_to(service).raise_for_status().json()["id"] for _ in range(8)]
            with locked(service.directory / "queue.db"):
                asked = [clients.submit(mail_to, service) for _ in range(4)]
                asked += [clients.submit(upload_to, service)]
                asked += [clients.submit(service.get, "/metrics")]
                assert service.get("/livez").status_code == 200
                assert service.get("/tasks").status_code == 200
                answers += [answer.result() for answer in asked]
                wait_for_checks(service, {"database": "failing", "uploads": "ok", "smtp": "ok"})
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
    """Let the engine wait for another program's lock for a shorter time than in the service."""
    assert sqlite_file.LOCKED_SECONDS <= 1
    monkeypatch.setattr(sqlite_file, "LOCKED_SECONDS", 0.1)


@pytest.mark.anyio
@pytest.mark.usefixtures("short_patience")
@pytest.mark.parametrize("how", ["IMMEDIATE", "EXCLUSIVE"])
async def test_an_engine_reports_that_its_database_is_locked(tmp_path: Path, how: str) -> None:
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


# The negative control


def test_control_a_plain_route_answers_500(tmp_path: Path, tried: Tried) -> None:
    """The route writes to SQLite, and does not handle a locked database."""
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
