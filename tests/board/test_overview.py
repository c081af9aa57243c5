"""The overview: its numbers, charts and health, for each client its own."""

import asyncio
import json
import sqlite3
from contextlib import closing, nullcontext
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from afterward.errors import QueueUnavailable
from app.api import shared_read
from tests.support.gate import bearing, served
from tests.support.pages import BROWSER, HOSTILE, Page
from tests.support.service import until, wait_for

SEND = "/send-notification/ada@example.com"
ADA = bearing("k1")


def numbers(client: TestClient, **headers: str) -> dict[str, str]:
    """Return the numbers of the overview by their names."""
    page = Page(client.get("/", headers=headers).text)
    names, values = page.all("dt"), page.all("dd")
    return {
        name.text.strip(): value.text.strip() for name, value in zip(names, values, strict=True)
    }


def fresh_numbers(client: TestClient, **headers: str) -> dict[str, str]:
    """Return the numbers as they are now, not those that were read up to a second ago."""
    client.app_state["board"].reads._reads.clear()
    return numbers(client, **headers)


def chart_summaries(client: TestClient, **headers: str) -> dict[str, str]:
    """Return the summaries of the charts by their titles."""
    page = Page(client.get("/", headers=headers).text)
    charts = page.all("svg", role="img")
    return {chart.children[0].text: chart.children[1].text for chart in charts}


def test_an_empty_service_shows_how_to_send_a_mail(browser: TestClient) -> None:
    page = Page(browser.get("/").text)

    assert numbers(browser) == {
        "Waiting": "0",
        "Running": "0",
        "Failed in the last hour": "0",
        "Oldest due": "none",
    }
    assert "curl -i -X POST http://testserver/send-notification/ada@example.com" in page.text
    assert page.all("section", id="by-curl")
    assert "No failed tasks." in page.text


def test_a_service_with_tasks_only_from_earlier_hours_is_not_called_empty(tmp_path: Path) -> None:
    with served(tmp_path) as client:
        wait_for(client, client.post(SEND).json()["id"])
    with closing(sqlite3.connect(tmp_path / "queue.db")) as connection, connection:
        connection.execute(
            "UPDATE tasks SET created_at = created_at - 7200, finished_at = finished_at - 7200"
        )
    with served(tmp_path) as client:
        page = Page(client.get("/", headers=BROWSER).text)
        assert not page.all("section", id="by-curl")
        assert page.all("span", class_="has-tasks")


def test_waiting_tasks_are_counted(idle_browser: TestClient) -> None:
    for _ in range(3):
        idle_browser.post(SEND)

    shown = fresh_numbers(idle_browser)
    assert shown["Waiting"] == "3"
    assert shown["Oldest due"] in {"now", "1 s ago"}
    assert not Page(idle_browser.get("/").text).all("section", id="by-curl")
    summary = chart_summaries(idle_browser)["Accepted tasks by minute"]
    assert "3 in the last 60 minutes" in summary


def test_waiting_tasks_without_a_worker_are_pointed_out(idle_browser: TestClient) -> None:
    idle_browser.post(SEND)
    assert "No worker is running" in Page(idle_browser.get("/").text).text


def test_finished_tasks_are_in_the_charts(browser: TestClient) -> None:
    wait_for(browser, browser.post(SEND).json()["id"])

    summaries = chart_summaries(browser)
    assert "1 in the last 60 minutes" in summaries["Accepted tasks by minute"]
    assert "1 in the last 60 minutes" in summaries["Succeeded tasks by minute"]
    assert "0 in the last 60 minutes" in summaries["Failed tasks by minute"]
    assert "No worker is running" not in browser.get("/").text


def test_after_a_restart_the_charts_are_read_from_the_record(tmp_path: Path) -> None:
    with served(tmp_path) as client:
        for _ in range(3):
            wait_for(client, client.post(SEND).json()["id"])
    with served(tmp_path) as client:
        wait_for(client, client.post(SEND).json()["id"])
        summaries = chart_summaries(client, **BROWSER)
        assert "4 in the last 60 minutes" in summaries["Accepted tasks by minute"]
        assert "4 in the last 60 minutes" in summaries["Succeeded tasks by minute"]


def test_failures_are_listed_with_hostile_texts_escaped(tmp_path: Path) -> None:
    with served(tmp_path) as client:
        task = client.post(SEND).json()
        wait_for(client, task["id"])
    fail(tmp_path, task["id"])
    with served(tmp_path) as client:
        page = Page(client.get("/", headers=BROWSER).text)
        row = page.find("tr", id=f"failure-{task['id']}")
        assert f"PermanentError: {HOSTILE}" in row.text
        assert not page.all("img", src="x")


def fail(directory: Path, task_id: str) -> None:
    """Make a finished task a failed one, with a hostile error, while no service runs."""
    error = json.dumps({"type": "PermanentError", "detail": HOSTILE})
    with closing(sqlite3.connect(directory / "queue.db")) as connection, connection:
        connection.execute(
            "UPDATE tasks SET status = 'failed', error = ? WHERE id = ?", (error, task_id)
        )


def test_a_client_sees_only_its_own_tasks(tmp_path: Path) -> None:
    with served(tmp_path, api_keys="ada: k1, eve: k2", worker_concurrency=0) as client:
        for _ in range(2):
            assert client.post(SEND, headers=bearing("k1")).status_code == 202
        ada, eve = (BROWSER | bearing(key) for key in ("k1", "k2"))
        assert fresh_numbers(client, **ada)["Waiting"] == "2"
        assert fresh_numbers(client, **ada)["Oldest due"] in {"now", "1 s ago"}
        assert fresh_numbers(client, **eve)["Waiting"] == "0"
        assert fresh_numbers(client, **eve)["Oldest due"] == "none"
        assert "2 in the last" in chart_summaries(client, **ada)["Accepted tasks by minute"]
        assert "0 in the last" in chart_summaries(client, **eve)["Accepted tasks by minute"]


def test_the_health_of_each_part_is_shown(tmp_path: Path) -> None:
    with served(tmp_path, catcher=False) as client:
        until(lambda: "alive" in client.get("/board/workers", headers=BROWSER).text, within=5)
        page = Page(client.get("/", headers=BROWSER).text)
        assert [" ".join(card.text.split()) for card in page.all("li", class_="card")] == [
            "Database ok",
            "Uploads ok",
            "SMTP server degraded Mail waits, and is sent later.",
            "Workers 1 alive",
        ]


def test_viewers_share_the_checks_and_the_queries(
    browser: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = count_calls(browser, monkeypatch, "check", "backlog")
    for _ in range(20):
        assert browser.get("/").status_code == 200

    assert calls["check"] == 1
    assert calls["backlog"] <= 3  # one a second


@pytest.mark.parametrize(
    ("path", "queries"),
    [
        ("/board/failures", ["count_failures", "list_tasks"]),
        ("/board/batches", ["list_batches", "count_batch"]),
    ],
)
def test_viewers_of_a_list_share_its_queries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, queries: list[str]
) -> None:
    with served(tmp_path) as client:
        client.post("/send-notifications", json={"recipients": ["ada@example.com"]})
        (task,) = client.get("/tasks").json()["data"]
        wait_for(client, task["id"])
    fail(tmp_path, task["id"])
    monkeypatch.setattr(shared_read, "_now", lambda: 0.0)
    with served(tmp_path) as client:
        calls = count_calls(client, monkeypatch, *queries)
        pages = [client.get(path, headers=BROWSER) for _ in range(5)]
        assert [len(Page(page.text).all("tr")) for page in pages] == [2] * 5, "the head, and a row"
        assert calls == dict.fromkeys(queries, 1)


def count_calls(client: TestClient, monkeypatch: pytest.MonkeyPatch, *names: str) -> dict[str, int]:
    """Count the calls of these methods of the engine from now on."""
    engine = client.app_state["queue"].engine
    calls = dict.fromkeys(names, 0)

    def replace(name: str) -> None:
        method = getattr(engine, name)

        async def counted(*arguments: Any, **options: Any) -> object:
            calls[name] += 1
            return await method(*arguments, **options)

        monkeypatch.setattr(engine, name, counted)

    for name in names:
        replace(name)
    return calls


def test_the_page_and_its_numbers_are_of_one_read(
    browser: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_read, "_now", count(0, 100).__next__)  # nothing is reused
    calls = count_calls(browser, monkeypatch, "backlog")
    assert browser.get("/").status_code == 200
    assert calls == {"backlog": 1}


def test_the_page_waits_for_the_health_without_a_turn(
    browser: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other requests would wait with it, while tasks run."""
    taken = []

    def take_turn() -> nullcontext[None]:
        taken.append(1)
        return nullcontext()

    monkeypatch.setattr(browser.app_state["turns"], "take_turn", take_turn)
    assert browser.get("/").status_code == 200
    assert taken == []
    assert browser.get("/board/workers").status_code == 200
    assert taken == [1]


def test_a_slow_health_check_does_not_hold_up_the_page(
    browser: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def hang() -> bool:
        await asyncio.sleep(60)
        return True

    monkeypatch.setattr("app.board.numbers.HEALTH_WAIT_SECONDS", 0.01)
    monkeypatch.setattr(browser.app_state["mailer"], "check", hang)
    page = Page(browser.get("/").text)
    cards = [" ".join(card.text.split()) for card in page.all("li", class_="card")]

    assert cards[:3] == ["Database checking", "Uploads checking", "SMTP server checking"]


def test_the_numbers_come_back_after_an_outage_of_the_database(
    browser: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse() -> None:
        raise QueueUnavailable

    with monkeypatch.context() as outage:
        outage.setattr(browser.app_state["queue"].engine, "backlog", refuse)
        assert browser.get("/").status_code == 503
    assert browser.get("/").status_code == 200
    until(lambda: numbers(browser)["Waiting"] == "0", within=5)


@pytest.mark.thorough
def test_the_numbers_are_the_same_on_postgresql(tmp_path: Path, database_url: str) -> None:
    keys = "ada: k1, eve: k2"
    with served(tmp_path, queue_url=database_url, api_keys=keys, worker_concurrency=0) as client:
        client.post("/send-notifications", json={"recipients": ["a@b.example"] * 3}, headers=ADA)
        ada, eve = BROWSER | ADA, BROWSER | bearing("k2")
        assert fresh_numbers(client, **ada)["Waiting"] == "3"
        assert fresh_numbers(client, **ada)["Oldest due"] in {"now", "1 s ago"}
        assert fresh_numbers(client, **eve)["Waiting"] == "0"
        assert "3 in the last" in chart_summaries(client, **ada)["Accepted tasks by minute"]
        page = Page(client.get("/board/batches", headers=ada).text)
        assert page.find("progress").attributes["value"] == "0.0"
