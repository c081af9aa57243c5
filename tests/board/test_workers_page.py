"""The page of the workers, and the records that it shows."""

import os
import socket
import time
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from afterward.task import Record, Writes
from app.tasks import workers as workers_module
from app.tasks.workers import COLLECTION, remove_silent_workers
from tests.support.gate import served
from tests.support.pages import BROWSER, HOSTILE, Page
from tests.support.service import Service, until

ENDED_PID = 2**22 + 1  # Linux gives out no greater id than 2**22


def write(client: TestClient, worker: str, seen_ago: float, **body: object) -> None:
    """Write the record of a worker of another process."""
    now = time.time()
    facts = {"host": "mail-1", "pid": 7, "concurrency": 10, "running": 3, "seen_at": now - seen_ago}
    record = Record(COLLECTION, "", worker, facts | body, now - 3600)
    client.portal.call(client.app_state["queue"].engine.put, Writes(records=(record,)))  # type: ignore[union-attr]


def rows(client: TestClient) -> dict[str, str]:
    """Return the text of each row by the name of its worker."""
    page = Page(client.get("/board/workers", headers=BROWSER).text)
    return {
        row.attributes["id"].removeprefix("worker-"): " ".join(row.text.split())
        for row in page.all("tr")
        if "id" in row.attributes
    }


def test_the_worker_of_this_process_is_alive(browser: TestClient) -> None:
    until(lambda: rows(browser), within=5)
    (row,) = rows(browser).values()
    assert " alive " in row
    assert "0 of 10" in row


def test_without_a_worker_the_page_says_how_to_start_one(idle_browser: TestClient) -> None:
    assert rows(idle_browser) == {}
    assert "python -m app worker" in idle_browser.get("/board/workers").text


def test_the_page_looks_for_heartbeats_which_are_not_events(idle_browser: TestClient) -> None:
    page = Page(idle_browser.get("/board/workers").text)
    assert page.find("main").attributes["data-live"] == "/board/live?part=workers"
    assert idle_browser.head("/board/live?part=workers").status_code == 200


def test_a_silent_worker_is_shown_as_silent(idle_browser: TestClient) -> None:
    write(idle_browser, "mail-1:7:abc", seen_ago=3)
    write(idle_browser, "mail-1:8:def", seen_ago=120)
    shown = rows(idle_browser)
    assert list(shown) == ["mail-1:7:abc", "mail-1:8:def"]
    assert " alive 3 s ago mail-1 7 3 of 10 1 h ago" in shown["mail-1:7:abc"]
    assert " silent 2 min ago " in shown["mail-1:8:def"]


def test_a_damaged_record_is_shown_and_its_texts_are_escaped(idle_browser: TestClient) -> None:
    write(
        idle_browser, HOSTILE, 0, host=HOSTILE, pid="7", concurrency=None, running=[], seen_at="x"
    )
    (row,) = rows(idle_browser).values()
    assert HOSTILE.replace("  ", " ") in row


def test_a_worker_that_stops_removes_its_record(tmp_path: Path) -> None:
    with served(tmp_path) as client:
        until(lambda: rows(client), within=5)
    with served(tmp_path, worker_concurrency=0) as client:
        assert rows(client) == {}


@pytest.mark.thorough
def test_the_record_of_a_killed_worker_stays_until_it_is_a_day_old(tmp_path: Path) -> None:
    with Service(tmp_path) as service:
        until(lambda: "alive" in service.get("/board/workers").text, within=5)
        service.kill()
    with served(tmp_path, worker_concurrency=0) as client:
        (name,) = rows(client)
        engine = client.app_state["queue"].engine
        for seconds, left in ((-60, [name]), (60, [])):
            before = time.time() + seconds

            async def remove(before: float = before) -> None:
                await remove_silent_workers(engine, seen_before=before)

            client.portal.call(remove)  # type: ignore[union-attr]
            assert list(rows(client)) == left


@pytest.mark.parametrize(
    ("host", "pid", "is_removed"),
    [
        (socket.gethostname(), ENDED_PID, True),
        (socket.gethostname(), os.getpid(), True),  # of a container that was started again
        (socket.gethostname(), 2**70, True),
        (socket.gethostname(), os.getppid(), False),
        (socket.gethostname(), None, False),
        ("another", ENDED_PID, False),
    ],
    ids=["ended", "same-id", "too-large", "alive", "no-id", "another-host"],
)
def test_a_new_worker_removes_the_records_of_processes_that_ended_on_its_host(
    tmp_path: Path, host: str, pid: int | None, is_removed: bool
) -> None:
    with served(tmp_path, worker_concurrency=0) as client:
        write(client, "before", seen_ago=60, host=host, pid=pid)
    with served(tmp_path) as client:
        until(lambda: rows(client).keys() - {"before"}, within=5)  # written after the removal
        assert ("before" in rows(client)) is not is_removed


def test_a_process_of_another_user_is_another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(pid: int, signal: int) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "kill", refuse)
    assert workers_module._is_another_process(7)


def test_a_worker_writes_its_heartbeat_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers_module, "EVERY_SECONDS", 0.05)
    with served(tmp_path) as client:
        engine = client.app_state["queue"].engine

        def seen_at() -> float:
            async def read() -> float:
                records = await engine.list_records(COLLECTION, client="", after=None, limit=1)
                return float(records[0].body["seen_at"]) if records else 0.0

            return client.portal.call(read)  # type: ignore[union-attr]

        until(seen_at, within=5)
        first = seen_at()
        until(lambda: seen_at() > first, within=5)
