"""A page of the database is damaged, and the file is too large to be checked before the start.

The check goes on while the service runs. When it finds the damage, `/readyz` says so, a log line
tells the operator what to do, and the service accepts and starts no more tasks. Running tasks end,
and tasks can be read. The next start checks the file again.
"""

import asyncio
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from structlog.testing import capture_logs

from afterward.engines.sqlite import damage_check
from afterward.engines.sqlite.damage_check import BackgroundCheck
from afterward.engines.sqlite.engine import SQLite
from afterward.errors import CannotStart, QueueDamaged, TaskNotFound
from afterward.task import Outcome, Status, Writes
from app.main import create_app
from tests.api.requests import problem_of
from tests.library.support import NOW, a_task, claim, claim_one, opened, put, retry
from tests.support.damage import DamagedRecord, leave_the_check_to_the_background
from tests.support.service import PATIENCE, settings_in, until
from tests.support.torture import Tried, form

TASKS = form(300, 100_000)

Lines = list[MutableMapping[str, Any]]


@pytest.fixture
def record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DamagedRecord:
    """A database with finished tasks and one damaged page, which the start does not find."""
    leave_the_check_to_the_background(monkeypatch)
    return DamagedRecord(tmp_path / "queue.db", TASKS)


@contextmanager
def service(directory: Path) -> Iterator[tuple[TestClient, Lines]]:
    """Run the service in this process. Its log lines are in the list."""
    app = create_app(settings_in(directory))
    with capture_logs() as lines, TestClient(app) as client:
        yield client, lines


def errors(lines: Lines) -> list[str]:
    return [line["event"] for line in lines if line["log_level"] == "error"]


def send(client: TestClient) -> Any:
    return client.post("/send-notification/ada@example.com")


# The service


def test_the_service_reports_the_damage_and_takes_no_more_tasks(
    record: DamagedRecord, tmp_path: Path, tried: Tried
) -> None:
    with service(tmp_path) as (client, lines):
        seconds = until(lambda: client.get("/readyz").status_code == 503, within=PATIENCE)
        assert client.get("/readyz").json() == {
            "status": "unready",
            "checks": {"database": "damaged", "uploads": "ok", "smtp": "ok"},
        }
        assert client.get("/livez").status_code == 200
        refused = send(client)
        assert "damaged" in problem_of(refused, 503)["detail"]
        assert "Retry-After" in refused.headers
        retried = client.post(f"/tasks/{record.newest_task}/retry")
        assert "damaged" in problem_of(retried, 503)["detail"]
        assert client.get(f"/tasks/{record.newest_task}").json()["status"] == "succeeded"
        assert len(client.get("/tasks?limit=5").json()["data"]) == 5
        assert record.is_unchanged()
    (found,) = (line for line in lines if line["event"] == "database damaged")
    tried(f"{TASKS:,} tasks and a damaged page", f"reported after {seconds:.1f} s")
    assert found["log_level"] == "error"
    assert found["file"] == str(record.path)
    assert "damaged (Page" in found["error"]
    assert ".recover" in found["remedy"]


def test_the_next_start_checks_the_file_again(
    record: DamagedRecord, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with service(tmp_path) as (client, _):
        until(lambda: client.get("/readyz").status_code == 503, within=PATIENCE)
    monkeypatch.setattr(damage_check, "FIRST_SECONDS", 2.0)  # the request comes before the check
    with service(tmp_path) as (client, _):
        assert send(client).status_code == 202
        until(lambda: client.get("/readyz").status_code == 503, within=PATIENCE)
    monkeypatch.undo()  # now the start has enough time to find the damage
    with pytest.raises(CannotStart, match="it is damaged"), service(tmp_path):
        pass


def test_a_sound_file_is_checked_to_its_end_and_the_service_goes_on(
    record: DamagedRecord, tmp_path: Path
) -> None:
    record.mend()
    with service(tmp_path) as (client, lines):
        until(lambda: "database checked" in [line["event"] for line in lines], within=PATIENCE)
        assert client.get("/readyz").status_code == 200
        assert send(client).status_code == 202
    assert not errors(lines)


def test_control_without_the_check_in_the_background_the_damage_is_not_noticed(
    record: DamagedRecord, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tried: Tried
) -> None:
    monkeypatch.setattr(BackgroundCheck, "_check", lambda *_, **__: True)
    with service(tmp_path) as (client, lines):
        until(lambda: "database checked" in [line["event"] for line in lines], within=PATIENCE)
        answers = [send(client).status_code for _ in range(10)]
        readiness = client.get("/readyz").status_code
    accepted = answers.count(202)
    tried("no check in the background: 10 POSTs", f"{accepted} answered 202; readyz {readiness}")
    assert accepted == 10
    assert readiness == 200
    assert record.path.exists()


# The engine


@pytest.mark.anyio
async def test_running_tasks_are_settled_and_no_further_task_is_claimed(
    record: DamagedRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here an operation meets the damaged page before the check does."""
    monkeypatch.setattr(BackgroundCheck, "start", lambda _: None)
    monkeypatch.setattr(BackgroundCheck, "stop", lambda _: None)
    first, second = a_task(), a_task()
    async with opened(record.path) as engine:
        await put(engine, first, second)
        running = await claim_one(engine)
        with capture_logs() as lines:
            for _ in range(2):
                with pytest.raises(QueueDamaged):
                    await engine.get(record.task_on_page)
        assert errors(lines) == ["database damaged"]  # only once
        await refuses_new_work(engine, second.id)
        await engine.settle(running, Outcome(Status.SUCCEEDED, result="null"), NOW)
        assert (await engine.get(running.id)).status is Status.SUCCEEDED
        assert (await engine.backlog()).counts[Status.QUEUED] == 1
        assert (await engine.cancel(second.id, NOW)).status is Status.CANCELLED


async def refuses_new_work(engine: SQLite, task_id: str) -> None:
    """Assert that the engine refuses each operation that accepts, starts or removes tasks."""
    for refused in (
        put(engine, a_task()),
        retry(engine, task_id, NOW, Writes()),
        claim(engine),
        engine.purge(finished_before=NOW, failed_before=NOW, answered_before=NOW, limit=10),
        engine.check(),
    ):
        with pytest.raises(QueueDamaged):
            await refused


@pytest.mark.anyio
async def test_an_operation_on_a_damaged_page_does_not_fail_the_others_of_its_transaction(
    record: DamagedRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BackgroundCheck, "start", lambda _: None)
    monkeypatch.setattr(BackgroundCheck, "stop", lambda _: None)
    async with opened(record.path) as engine:
        with capture_logs() as lines:
            damaged, newest, unknown = await asyncio.gather(
                engine.get(record.task_on_page),
                engine.get(record.newest_task),
                engine.get(a_task().id),
                return_exceptions=True,
            )
    assert isinstance(damaged, QueueDamaged)
    assert isinstance(unknown, TaskNotFound)
    assert not isinstance(newest, BaseException)
    assert newest.id == record.newest_task
    assert errors(lines) == ["database damaged"]
