"""POST /tasks/retry and POST /tasks/cancel: dry runs, the durable task, and bad input."""

import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx2
import pytest
from fastapi.testclient import TestClient

from app.api.task_actions import count_matches
from tests.api.requests import problem_of
from tests.support.gate import bearing, served
from tests.support.service import Json, wait_for
from tests.support.stored import KIND, failed_tasks, put_tasks

ENGINES = ["sqlite", "postgresql"]


def retry(client: httpx2.Client, wanted: object, **more: Any) -> httpx2.Response:
    headers = more.pop("headers", {})
    return client.post("/tasks/retry", json={"filter": wanted, **more}, headers=headers)


def cancel(client: httpx2.Client, wanted: object, **more: Any) -> httpx2.Response:
    return client.post("/tasks/cancel", json={"filter": wanted, **more})


def result(client: httpx2.Client, response: httpx2.Response) -> Json:
    """Return the result of a bulk action, when its task has succeeded."""
    assert response.status_code == 202, response.text
    task = wait_for(client, response.json()["id"])
    assert task["progress"] == 1
    found: Json = task["result"]
    return found


def statuses(client: httpx2.Client, query: str) -> list[str]:
    tasks = client.get(f"/tasks?limit=100&{query}").raise_for_status().json()["data"]
    return [task["status"] for task in tasks]


# Dry runs and actions.


def test_all_failed_tasks_of_an_error_are_retried(client: TestClient) -> None:
    failed_tasks(client, 3, smtp_code=550)
    failed_tasks(client, 2, smtp_code=554)
    wanted = {"error": "PermanentError 550"}
    assert retry(client, wanted, dry_run=True).json() == {"matches": 3}
    assert statuses(client, "kind=retired") == ["failed"] * 5

    response = retry(client, wanted)
    queued = response.json()
    assert response.headers["location"] == f"/tasks/{queued['id']}"
    assert queued.keys() == {"id", "kind", "status", "message", "created_at"}
    assert (queued["kind"], queued["status"]) == ("retry_tasks", "queued")
    assert queued["message"] == "Retry queued"
    assert result(client, response) == {"matched": 3, "done": 3, "skipped": 0}
    assert statuses(client, "kind=retired") == ["failed"] * 2 + ["queued"] * 3
    assert retry(client, wanted, dry_run=True).json() == {"matches": 0}


def test_all_waiting_tasks_of_a_batch_are_cancelled(client: TestClient) -> None:
    put_tasks(client, 3, batch_id="batch-1")
    put_tasks(client, 1, batch_id="batch-2")
    wanted = {"batch_id": "batch-1"}
    assert cancel(client, wanted, dry_run=True).json() == {"matches": 3}
    response = cancel(client, wanted)
    assert (response.json()["kind"], response.json()["message"]) == (
        "cancel_tasks",
        "Cancellation queued",
    )
    assert result(client, response) == {"matched": 3, "done": 3, "skipped": 0}
    assert statuses(client, "kind=retired") == ["queued"] + ["cancelled"] * 3


def test_a_status_chooses_among_the_tasks_that_allow_the_action(client: TestClient) -> None:
    failed_tasks(client, 2)
    put_tasks(client, 1)
    result(client, cancel(client, {"kind": "retired"}))
    for wanted, matches in {
        "failed": 2,
        "cancelled": 1,
        "failed,cancelled": 3,
        "failed,queued": 2,
        "queued,running,succeeded": 0,
    }.items():
        assert retry(client, {"status": wanted, "kind": "retired"}, dry_run=True).json() == {
            "matches": matches
        }
    nothing = retry(client, {"status": "queued"})
    assert result(client, nothing) == {"matched": 0, "done": 0, "skipped": 0}


def test_a_time_can_be_a_condition(client: TestClient) -> None:
    failed_tasks(client, 2)
    now = datetime.now(UTC).isoformat()
    assert retry(client, {"until": now}, dry_run=True).json() == {"matches": 2}
    assert retry(client, {"since": now}, dry_run=True).json() == {"matches": 0}
    assert retry(client, {"until": "1970-01-01T00:00:00Z"}, dry_run=True).json() == {"matches": 0}
    assert cancel(client, {"until": "1970-01-01T00:00:00Z"}, dry_run=True).json() == {"matches": 0}


def test_a_request_that_is_repeated_with_its_key_acts_once(idle_client: TestClient) -> None:
    key = {"Idempotency-Key": "once"}
    first = retry(idle_client, {"kind": "retired"}, headers=key)
    again = retry(idle_client, {"kind": "retired"}, headers=key)
    assert again.headers["idempotency-replay"] == "true"
    assert (again.json(), again.headers["location"]) == (first.json(), first.headers["location"])
    assert statuses(idle_client, "kind=retry_tasks") == ["queued"]
    problem_of(retry(idle_client, {"kind": "another"}, headers=key), 422)


def test_a_dry_run_queues_nothing_and_keeps_no_key(idle_client: TestClient) -> None:
    key = {"Idempotency-Key": "once"}
    dry = retry(idle_client, {"kind": "retired"}, dry_run=True, headers=key)
    assert (dry.status_code, dry.headers["content-type"]) == (200, "application/json")
    assert dry.content.endswith(b"}\n")
    assert "location" not in dry.headers
    assert statuses(idle_client, "") == []
    assert retry(idle_client, {"kind": "retired"}, headers=key).status_code == 202


def test_a_task_that_is_queued_after_the_request_is_not_cancelled(idle_client: TestClient) -> None:
    put_tasks(idle_client, 2)
    response = cancel(idle_client, {"kind": "retired"})
    time.sleep(0.002)
    put_tasks(idle_client, 1)
    task = idle_client.get(response.headers["location"]).json()
    assert task["status"] == "queued"
    assert cancel(idle_client, {"kind": "retired"}, dry_run=True).json() == {"matches": 3}


def test_an_action_spares_other_actions_unless_it_names_their_kind(
    idle_client: TestClient,
) -> None:
    client = idle_client
    for kind in (KIND, "retry_tasks", "cancel_tasks"):
        failed_tasks(client, 1, kind=kind, about="ada", batch_id="batch-1")
        put_tasks(client, 1, kind=kind, about="ada", batch_id="batch-1")
    conditions = [
        {"about": "ada"},
        {"batch_id": "batch-1"},
        {"until": "2100-01-01T00:00:00Z"},
        {"status": "failed,queued"},
    ]
    for wanted in conditions:
        assert retry(client, wanted, dry_run=True).json() == {"matches": 1}
        assert cancel(client, wanted, dry_run=True).json() == {"matches": 1}
    assert retry(client, {"error": "PermanentError"}, dry_run=True).json() == {"matches": 1}
    for kind in ("retry_tasks", "cancel_tasks"):
        named = {"kind": kind, "about": "ada"}
        assert retry(client, named, dry_run=True).json() == {"matches": 1}
        assert cancel(client, named, dry_run=True).json() == {"matches": 1}


def test_an_action_leaves_failed_actions_as_they_are(client: TestClient) -> None:
    failed_tasks(client, 2)
    put_tasks(client, 1, kind="retry_tasks", arguments='{"args":[],"kwargs":{}}')
    (broken,) = client.get("/tasks?kind=retry_tasks").json()["data"]
    assert wait_for(client, broken["id"], status="failed")
    assert result(client, retry(client, {"status": "failed"})) == {
        "matched": 2,
        "done": 2,
        "skipped": 0,
    }
    assert statuses(client, "kind=retry_tasks") == ["succeeded", "failed"]


@pytest.fixture
def two_clients(tmp_path: Path) -> Iterator[TestClient]:
    with served(tmp_path, api_keys="ada: ada-key, eve: eve-key") as client:
        yield client


def test_a_client_acts_on_its_own_tasks_only(two_clients: TestClient) -> None:
    failed_tasks(two_clients, 2, client="ada")
    failed_tasks(two_clients, 3, client="eve")
    failed_tasks(two_clients, 4)
    two_clients.headers.update(bearing("ada-key"))
    assert retry(two_clients, {"kind": "retired"}, dry_run=True).json() == {"matches": 2}
    response = retry(two_clients, {"kind": "retired"})
    assert result(two_clients, response)["done"] == 2
    assert statuses(two_clients, "kind=retired") == ["queued"] * 2
    two_clients.headers.update(bearing("eve-key"))
    assert statuses(two_clients, "kind=retired") == ["failed"] * 3
    problem_of(two_clients.get(response.headers["location"]), 404)


# Bad input.


@pytest.mark.parametrize("path", ["/tasks/retry", "/tasks/cancel"])
@pytest.mark.parametrize(
    ("body", "pointer"),
    [
        ({}, "/filter"),
        ({"filter": {}}, "/filter"),
        ({"filter": None}, "/filter"),
        ({"filter": "failed"}, "/filter"),
        ({"filter": {"kind": None, "status": None}}, "/filter"),
        ({"filter": {}, "dry_run": True}, "/filter"),
        ({"filter": {"kind": 1}}, "/filter/kind"),
        ({"filter": {"kind": "a\0b"}}, "/filter/kind"),
        ({"filter": {"kind": "k" * 101}}, "/filter/kind"),
        ({"filter": {"status": "lost"}}, "/filter/status"),
        ({"filter": {"status": ""}}, "/filter/status"),
        ({"filter": {"status": "failed," * 100_000 + "failed"}}, "/filter/status"),
        ({"filter": {"status": ["failed"]}}, "/filter/status"),
        ({"filter": {"since": "yesterday"}}, "/filter/since"),
        ({"filter": {"since": 1700000000}}, "/filter/since"),
        ({"filter": {"until": "2026-01-31T12:00:00"}}, "/filter/until"),
        ({"filter": {"colour": "green"}}, "/filter/colour"),
        ({"filter": {"limit": 5}}, "/filter/limit"),
        ({"filter": {"kind": "a"}, "dry_run": "true"}, "/dry_run"),
        ({"filter": {"kind": "a"}, "dry_run": 1}, "/dry_run"),
        ({"filter": {"kind": "a"}, "dryrun": True}, "/dryrun"),
    ],
    ids=lambda value: str(value)[:80],
)
@pytest.mark.thorough
def test_a_body_that_cannot_be_understood_is_refused(
    idle_client: TestClient, path: str, body: Json, pointer: str
) -> None:
    problem = problem_of(idle_client.post(path, json=body), 422)
    assert [error["pointer"] for error in problem["errors"]] == [pointer]
    assert statuses(idle_client, "") == []


@pytest.mark.parametrize("path", ["/tasks/retry", "/tasks/cancel"])
def test_the_paths_have_only_post(idle_client: TestClient, path: str) -> None:
    """GET does not look for a task of that name."""
    response = idle_client.get(path)
    problem_of(response, 405)
    assert response.headers["allow"] == "OPTIONS, POST"
    assert idle_client.options(path).headers["allow"] == "OPTIONS, POST"
    for other in ("/tasks/retried", "/tasks/cancel-all"):
        problem_of(idle_client.get(other), 404)


def test_a_full_backlog_refuses_the_action(tmp_path: Path) -> None:
    with served(tmp_path, worker_concurrency=0, max_backlog=1) as client:
        put_tasks(client, 1)
        response = retry(client, {"kind": "retired"})
        problem_of(response, 503)
        assert response.headers["retry-after"]
        assert retry(client, {"kind": "retired"}, dry_run=True).json() == {"matches": 0}


def test_the_example_of_the_documentation_is_valid(idle_client: TestClient) -> None:
    schema = idle_client.get("/openapi.json").json()["components"]["schemas"]["BulkAction"]
    (example,) = schema["examples"]
    for path in ("/tasks/retry", "/tasks/cancel"):
        assert idle_client.post(path, json=example).status_code == 202


def test_the_moment_of_acceptance_is_before_the_count(
    idle_client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a task that fails between the two would be retried, but not counted."""
    queue, moments = idle_client.app_state["queue"], []

    async def count_late(*args: Any) -> int:
        moments.append((args[-1], queue.now()))
        return await count_matches(*args)

    monkeypatch.setattr("app.api.routes.bulk.count_matches", count_late)
    assert retry(idle_client, {"kind": "retired"}).status_code == 202
    ((accepted_at, counted_at),) = moments
    assert accepted_at <= counted_at
