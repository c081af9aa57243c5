"""Health checks, readiness, metrics, and the links of the overview."""

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from afterward.errors import QueueUnavailable
from app.api import shared_read
from app.main import create_app
from tests.support.service import free_port, settings_in, wait_for


@contextmanager
def without_smtp(directory: Path) -> Iterator[TestClient]:
    """Run a service without an SMTP server."""
    settings = settings_in(directory, catcher=False, smtp_port=free_port(), retry_base_seconds=60)
    with TestClient(create_app(settings)) as client:
        yield client


# Health and readiness.


def test_a_service_that_runs_is_alive(client: TestClient) -> None:
    response = client.get("/livez")
    assert (response.status_code, response.text) == (200, "ok\n")


def test_a_service_whose_parts_all_work_is_ready(client: TestClient) -> None:
    response = client.get("/readyz")
    assert response.status_code == 200
    assert response.json() == {
        "status": "ready",
        "checks": {"database": "ok", "uploads": "ok", "smtp": "ok"},
    }


def test_without_smtp_the_service_is_degraded_and_mail_waits(tmp_path: Path) -> None:
    with without_smtp(tmp_path) as client:
        response = client.get("/readyz")
        assert response.status_code == 200
        assert response.json() == {
            "status": "degraded",
            "checks": {"database": "ok", "uploads": "ok", "smtp": "degraded"},
        }
        queued = client.post("/send-notification/ada@example.com")
        assert queued.status_code == 202
        assert wait_for(client, queued.json()["id"], "retrying")["attempts"] == 1


def test_a_failing_database_makes_the_service_unready_but_still_alive(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse() -> None:
        raise QueueUnavailable

    monkeypatch.setattr(client.app_state["queue"].engine, "check", refuse)
    response = client.get("/readyz")
    assert response.status_code == 503
    assert response.json() == {
        "status": "unready",
        "checks": {"database": "failing", "uploads": "ok", "smtp": "ok"},
    }
    assert client.get("/livez").status_code == 200


def test_an_upload_store_that_cannot_be_written_makes_the_service_unready(
    client: TestClient, tmp_path: Path
) -> None:
    (tmp_path / "uploads").write_text("a file where the folder should be")
    response = client.get("/readyz")
    assert response.status_code == 503
    assert response.json()["checks"] == {"database": "ok", "uploads": "failing", "smtp": "ok"}


def test_each_check_runs_at_most_once_a_second(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests for /readyz need no key and have no rate limit, but a check writes to the disk."""
    clock = [0.0]
    monkeypatch.setattr(shared_read, "_now", lambda: clock[0])
    asked = Counter[str]()
    settings = settings_in(
        tmp_path, api_keys="ada: k1", rate_limit="1/hour", worker_concurrency=0, catcher=False
    )
    with TestClient(create_app(settings)) as client:
        state = client.app_state
        for name in ("queue", "uploads", "mailer"):
            checked = state["queue"].engine if name == "queue" else state[name]
            count_calls(checked, "check", asked, name, monkeypatch)
        for seconds in (0, 0.9, 1.1, 1.2):
            clock[0] = seconds
            for _ in range(20):
                assert client.get("/readyz").json()["status"] == "degraded"
            assert set(asked.values()) == {1 if seconds < 1 else 2}
    assert asked.keys() == {"queue", "uploads", "mailer"}


def count_calls(
    owner: Any, name: str, calls: Counter[str], counted_as: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Count the calls of a method from now on."""
    method = getattr(owner, name)

    async def counted() -> object:
        calls[counted_as] += 1
        return await method()

    monkeypatch.setattr(owner, name, counted)


@pytest.mark.parametrize("owner", ["queue", "uploads", "mailer"])
def test_a_check_that_raises_an_unexpected_error_has_failed(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, owner: str
) -> None:
    async def fail() -> bool:
        raise LookupError("a secret place")

    state = client.app_state
    monkeypatch.setattr(state["queue"].engine if owner == "queue" else state[owner], "check", fail)
    response = client.get("/readyz")
    assert response.status_code == (200 if owner == "mailer" else 503)
    assert response.json()["status"] == ("degraded" if owner == "mailer" else "unready")
    assert "secret" not in response.text


# Metrics.


def metric(client: TestClient, line: str) -> float:
    """Return the value of a line of /metrics, or 0 if the line does not exist (yet)."""
    found = re.search(rf"^{re.escape(line)} (\S+)$", client.get("/metrics").text, re.MULTILINE)
    return float(found[1]) if found else 0.0


def test_the_metrics_are_in_the_text_format_of_prometheus(client: TestClient) -> None:
    response = client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert "# TYPE afterward_tasks_total counter" in response.text


@pytest.mark.parametrize(
    ("path", "kind"), [("/send-email/?email=ada@example.com", "send_email"), ("/items/7", None)]
)
def test_a_task_is_counted_when_it_is_queued_started_and_done(
    client: TestClient, path: str, kind: str | None
) -> None:
    wait_for(client, client.post(path).json()["id"])
    labels = f'kind="{kind or "send_email"}",outcome='
    for outcome in ("queued", "started", "succeeded"):
        assert metric(client, f'afterward_tasks_total{{{labels}"{outcome}"}}') == 1
    assert metric(client, f'afterward_task_duration_seconds_count{{{labels}"succeeded"}}') == 1
    # A finished task is no longer part of the backlog, under any of its labels.
    backlog = re.findall(
        r"^afterward_backlog\{.* (\S+)$", client.get("/metrics").text, re.MULTILINE
    )
    assert [float(tasks) for tasks in backlog] == [0, 0, 0]
    assert metric(client, "afterward_smtp_connections") == 1


def test_the_backlog_and_its_age_are_those_of_the_waiting_tasks(idle_client: TestClient) -> None:
    assert metric(idle_client, "afterward_backlog_age_seconds") == 0
    for _ in range(3):
        idle_client.post("/send-notification/ada@example.com")
    assert metric(idle_client, 'afterward_backlog{status="queued"}') == 3
    assert metric(idle_client, "afterward_backlog_age_seconds") > 0


def test_a_failed_attempt_is_counted(tmp_path: Path) -> None:
    with without_smtp(tmp_path) as client:
        queued = client.post("/send-notification/ada@example.com").json()
        wait_for(client, queued["id"], "retrying")
        outcome = 'kind="send_email",outcome="retrying"'
        assert metric(client, f"afterward_tasks_total{{{outcome}}}") == 1


# Pages.


def test_every_link_of_the_overview_works(client: TestClient) -> None:
    links = {unescape(link) for link in re.findall('href="([^"]+)"', client.get("/").text)}
    assert {"/docs", "/inbox", "/board/tasks", "/board/uploads", "/metrics"} <= links
    for link in links - {"#main"}:
        assert client.get(link).status_code == 200
