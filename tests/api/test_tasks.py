"""The routes of tasks: lists, cancellation, retries, and event streams."""

import json
import re
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import datetime, timedelta, timezone
from pathlib import Path
from urllib.parse import quote

import httpx2
import pytest
from fastapi.testclient import TestClient

from afterward.filter import storable_about
from tests.api.requests import problem_of
from tests.support.gate import bearing, served
from tests.support.service import PATIENCE, Json, Service, wait_for
from tests.support.smtp_server import SmtpServer
from tests.support.stored import crash, failed_tasks, put_tasks

NOWHERE: Json = {"smtp_port": 1, "catcher": False}  # no server listens on port 1

ENGINES = ["sqlite", "postgresql"]


def queue_mails(client: httpx2.Client, number: int = 1) -> list[str]:
    """Queue some mails, and return the ids of their tasks, newest first."""
    paths = [f"/send-notification/user{n}@example.com" for n in range(number)]
    return [client.post(path).json()["id"] for path in paths][::-1]


def ids(page: httpx2.Response) -> list[str]:
    return [task["id"] for task in page.raise_for_status().json()["data"]]


# Lists.


@pytest.mark.parametrize(
    "path",
    ["/tasks/a%00", "/tasks?after=%00", "/tasks?kind=%00", "/uploads/%00", "/uploads?after=%00"],
)
def test_a_nul_in_an_id_is_refused_before_the_database_sees_it(
    idle_client: TestClient, path: str
) -> None:
    """PostgreSQL refuses a NUL with an error, which would look like an outage."""
    problem_of(idle_client.get(path), 422)


def test_the_newest_tasks_come_first_page_by_page(idle_client: TestClient) -> None:
    queued = queue_mails(idle_client, 5)
    first = idle_client.get("/tasks?limit=2")
    second = idle_client.get(f"/tasks?limit=2&after={ids(first)[-1]}")
    third = idle_client.get(f"/tasks?limit=2&after={ids(second)[-1]}")
    assert [ids(first), ids(second), ids(third)] == [queued[:2], queued[2:4], queued[4:]]
    assert [page.json()["has_more"] for page in (first, second, third)] == [True, True, False]


def test_a_list_that_just_fits_a_page_has_no_more(idle_client: TestClient) -> None:
    queue_mails(idle_client, 2)
    assert idle_client.get("/tasks?limit=2").json()["has_more"] is False


def test_a_page_has_fifty_tasks_by_default(idle_client: TestClient) -> None:
    queued = queue_mails(idle_client, 51)
    assert ids(idle_client.get("/tasks")) == queued[:50]
    assert ids(idle_client.get("/tasks?limit=100")) == queued


def test_tasks_can_be_filtered_by_status_and_by_kind(idle_client: TestClient) -> None:
    saved = idle_client.post("/save-data/?user_id=ada", json={}).json()["id"]
    cancelled, queued = queue_mails(idle_client, 2)
    idle_client.post(f"/tasks/{cancelled}/cancel")
    for query, found in {
        "": [cancelled, queued, saved],
        "status=queued": [queued, saved],
        "status=cancelled": [cancelled],
        "status=failed": [],
        "kind=send_email": [cancelled, queued],
        "kind=save_data": [saved],
        "kind=nothing": [],
        "status=queued&kind=send_email": [queued],
        f"status=queued&after={queued}": [saved],
    }.items():
        assert ids(idle_client.get(f"/tasks?{query}")) == found, query


def test_each_filter_selects_the_tasks_that_match_exactly(idle_client: TestClient) -> None:
    (mine,) = put_tasks(
        idle_client, 1, about="ada@example.com", batch_id="batch-1", request_id="request-1"
    )
    others = put_tasks(
        idle_client, 2, about="adam@example.com", batch_id="batch-10", request_id="request-10"
    )
    (failed,) = failed_tasks(idle_client, 1, smtp_code=550, about="grace@example.com")
    (other,) = failed_tasks(idle_client, 1, smtp_code=551)
    for query, found in {
        "about=ada@example.com": [mine],
        "about=ADA@example.com": [],
        "about=ada": [],
        "batch_id=batch-1": [mine],
        "request_id=request-1": [mine],
        "request_id=request-1&about=grace@example.com": [],
        "error=PermanentError+550": [failed],
        "error=PermanentError%20550&kind=retired": [failed],
        "error=PermanentError": [],
        "error=PermanentError+550&status=queued": [],
        "status=queued,failed": [other, failed, *others, mine],
        "status=failed,failed": [other, failed],
        "status=queued&about=ada@example.com": [mine],
        "status=running": [],
    }.items():
        assert ids(idle_client.get(f"/tasks?{query}")) == [task.id for task in found], query


def test_tasks_can_be_filtered_by_the_time_of_their_creation(idle_client: TestClient) -> None:
    """`since` is included, and `until` is not. Any offset from UTC is understood."""
    first, second = queue_mails(idle_client)[0], queue_mails(idle_client)[0]
    at = idle_client.get(f"/tasks/{second}").json()["created_at"]
    same = datetime.fromisoformat(at).astimezone(timezone(timedelta(hours=5, minutes=30)))
    for moment in (at, at.replace("T", " "), at.lower(), same.isoformat()):
        for query, found in {
            "since": [second],
            "until": [first],
            "status=queued&since": [second],
            "kind=send_email&until": [first],
        }.items():
            assert ids(idle_client.get(f"/tasks?{query}={quote(moment)}")) == found, (query, moment)
    assert ids(idle_client.get(f"/tasks?since={quote(at)}&until={quote(at)}")) == []
    assert ids(idle_client.get("/tasks?since=0001-01-01T00:00:00%2B14:00")) == [second, first]
    assert ids(idle_client.get("/tasks?until=9999-12-31T23:59:59-14:00")) == [second, first]


@pytest.mark.parametrize(
    ("query", "pointer"),
    [
        ("status=lost", "/status"),
        ("status=queued,lost", "/status"),
        ("status=queued,,failed", "/status"),
        ("status=queued%20", "/status"),
        ("status=queued%0A", "/status"),
        ("status=", "/status"),
        ("since=yesterday", "/since"),
        ("since=1700000000", "/since"),
        ("since=2026-01-31", "/since"),
        ("since=2026-01-31T12:00:00", "/since"),
        ("since=2026-01-31T12:00:00+01:00", "/since"),  # + is a space here
        ("until=2026-02-30T12:00:00Z", "/until"),
        ("until=2026-01-31T25:00:00Z", "/until"),
        ("until=2026-01-31T12:00:00Z%00", "/until"),
        ("about=%00", "/about"),
        (f"about={'a' * 1001}", "/about"),
        ("batch_id=%00", "/batch_id"),
        (f"batch_id={'a' * 101}", "/batch_id"),
        ("request_id=%00", "/request_id"),
        ("error=%00", "/error"),
        ("kind=%00", "/kind"),
        ("limit=0", "/limit"),
        ("limit=101", "/limit"),
        ("after=task", "/after"),
    ],
)
def test_a_filter_that_cannot_be_understood_is_refused(
    idle_client: TestClient, query: str, pointer: str
) -> None:
    problem = problem_of(idle_client.get(f"/tasks?{query}"), 422)
    assert [error["pointer"] for error in problem["errors"]] == [pointer]


def test_tasks_are_found_by_a_long_recipient(idle_client: TestClient) -> None:
    """The first 255 characters are stored, so the filter compares as many."""
    about = storable_about("ä" * 300)
    (task,) = put_tasks(idle_client, 1, about=about)
    assert ids(idle_client.get(f"/tasks?about={'ä' * 300}")) == [task.id]
    assert ids(idle_client.get(f"/tasks?about={'ä' * 255}")) == [task.id]
    assert ids(idle_client.get(f"/tasks?about={'ä' * 254}")) == []


def test_filters_show_no_task_of_another_client(tmp_path: Path) -> None:
    with served(tmp_path, worker_concurrency=0, api_keys="ada: ada-key, eve: eve-key") as client:
        put_tasks(client, 1, client="ada", about="a", batch_id="b", request_id="r")
        failed_tasks(client, 1, client="ada", smtp_code=550)
        for query in ("", "about=a", "batch_id=b", "request_id=r", "error=PermanentError+550"):
            mine = client.get(f"/tasks?{query}", headers=bearing("ada-key"))
            others = client.get(f"/tasks?{query}", headers=bearing("eve-key"))
            assert (len(ids(mine)) > 0, ids(others)) == (True, []), query


# One task.


def test_a_mail_is_about_its_recipient_and_an_upload_about_its_id(client: TestClient) -> None:
    response = client.post("/send-email/?email=Ada@example.COM", headers={"X-Request-ID": "7f3a"})
    mail = wait_for(client, response.json()["id"])
    assert (mail["about"], mail["request_id"]) == ("Ada@example.com", "7f3a")
    assert mail["batch_id"] is None
    assert re.fullmatch(r".+:\d+:[0-9a-f]{12}", mail["worker"])
    uploaded = client.post("/upload", files={"file": ("a.txt", b"Hello")}).json()
    upload = wait_for(client, uploaded["id"])
    assert upload["about"] == uploaded["upload"]["id"]
    assert ids(client.get(f"/tasks?about={upload['about']}")) == [upload["id"]]
    assert ids(client.get("/tasks?request_id=7f3a")) == [mail["id"]]


def test_a_waiting_task_has_no_worker_and_no_history(idle_client: TestClient) -> None:
    (task_id,) = queue_mails(idle_client)
    task = idle_client.get(f"/tasks/{task_id}").json()
    assert (task["worker"], task["history"]) == (None, [])


@pytest.mark.thorough
def test_a_task_tells_its_failed_attempts_and_the_list_does_not(
    tmp_path: Path, smtp_server: SmtpServer
) -> None:
    smtp_server.always["rcpt"] = "451 4.7.1 Greylisted"
    settings = {"catcher": False, "smtp_port": smtp_server.port, "retry_base_seconds": 0.001}
    with served(tmp_path, **settings) as client:
        (task_id,) = queue_mails(client)
        while len(client.get(f"/tasks/{task_id}").json()["history"]) < 3:
            pass
        del smtp_server.always["rcpt"]
        task = wait_for(client, task_id)
        assert "history" not in client.get("/tasks").json()["data"][0]
    history = task["history"]
    assert [attempt["attempt"] for attempt in history] == [*range(1, len(history) + 1)][-20:]
    for attempt in history:
        assert attempt.keys() == {"attempt", "started_at", "seconds", "worker", "error"}
        assert attempt["seconds"] >= 0
        assert attempt["worker"] == task["worker"]
        assert attempt["error"]["smtp_code"] == 451
        assert attempt["started_at"].endswith("Z")


def test_an_attempt_that_ended_with_a_crash_has_no_length(idle_client: TestClient) -> None:
    (task,) = put_tasks(idle_client, 1)
    crash(idle_client, task)
    (attempt,) = idle_client.get(f"/tasks/{task.id}").raise_for_status().json()["history"]
    assert (attempt["attempt"], attempt["seconds"]) == (1, None)
    assert attempt["error"]["type"] == "WorkerDied"


@pytest.mark.parametrize("history", ["{", "1", '[{"attempt": "no number"}]', "[null]", "[" * 9999])
def test_a_damaged_history_is_left_out(tmp_path: Path, history: str) -> None:
    with served(tmp_path, worker_concurrency=0) as client:
        (task,) = put_tasks(client, 1)
        with closing(sqlite3.connect(tmp_path / "queue.db")) as database, database:
            database.execute("UPDATE tasks SET history = ?", (history,))
        assert client.get(f"/tasks/{task.id}").raise_for_status().json()["history"] == []


def test_a_task_tells_its_newest_20_failed_attempts(tmp_path: Path) -> None:
    """A crash adds an attempt to 20 that are stored already."""
    attempt = {"started_at": 1.7e9, "seconds": 0.1, "worker": "w", "error": None}
    history = json.dumps([{"attempt": n, **attempt} for n in range(1, 23)])
    with served(tmp_path, worker_concurrency=0) as client:
        (task,) = put_tasks(client, 1)
        with closing(sqlite3.connect(tmp_path / "queue.db")) as database, database:
            database.execute("UPDATE tasks SET history = ?", (history,))
        listed = client.get(f"/tasks/{task.id}").raise_for_status().json()["history"]
    assert [each["attempt"] for each in listed] == [*range(3, 23)]


@pytest.mark.parametrize("seconds", [1e300, -1e300, 1e18])
def test_a_damaged_time_is_an_end_of_the_calendar(tmp_path: Path, seconds: float) -> None:
    with served(tmp_path, worker_concurrency=0) as client:
        damaged, whole = put_tasks(client, 2)
        with closing(sqlite3.connect(tmp_path / "queue.db")) as database, database:
            database.execute("UPDATE tasks SET created_at = ? WHERE id = ?", (seconds, damaged.id))
        listed = client.get("/tasks").raise_for_status().json()["data"]
        years = {task["id"]: task["created_at"][:4] for task in listed}
        assert years.keys() == {damaged.id, whole.id}
        assert years[damaged.id] == ("9999" if seconds > 0 else "0001")


# Cancel.


def test_a_waiting_task_can_be_cancelled_once(idle_client: TestClient) -> None:
    (task_id,) = queue_mails(idle_client)
    response = idle_client.post(f"/tasks/{task_id}/cancel")
    assert response.status_code == 200
    assert response.json() == idle_client.get(f"/tasks/{task_id}").json()
    assert response.json()["status"] == "cancelled"
    assert response.json()["finished_at"] is not None
    problem_of(idle_client.post(f"/tasks/{task_id}/cancel"), 409)


def test_a_finished_task_cannot_be_cancelled(client: TestClient) -> None:
    (task_id,) = queue_mails(client)
    wait_for(client, task_id)
    problem_of(client.post(f"/tasks/{task_id}/cancel"), 409)
    assert client.get(f"/tasks/{task_id}").json()["status"] == "succeeded"


def test_a_task_between_two_attempts_can_be_cancelled(
    tmp_path: Path, smtp_server: SmtpServer
) -> None:
    smtp_server.always["rcpt"] = "451 4.7.1 Greylisted"
    port = smtp_server.port
    with Service(tmp_path, catcher=False, smtp_port=port, retry_base_seconds=1000) as service:
        (task_id,) = queue_mails(service.client)
        service.wait_for(task_id, "retrying")
        assert service.post(f"/tasks/{task_id}/cancel").json()["status"] == "cancelled"


def test_control_a_test_does_not_wait_for_a_status_that_can_no_longer_come(
    idle_client: TestClient,
) -> None:
    (task_id,) = queue_mails(idle_client)
    idle_client.post(f"/tasks/{task_id}/cancel")
    began = time.monotonic()
    with pytest.raises(AssertionError, match="the task is not succeeded"):
        wait_for(idle_client, task_id)
    assert time.monotonic() < began + PATIENCE / 2


# Retry.


def test_a_cancelled_task_can_be_retried(idle_client: TestClient) -> None:
    (task_id,) = queue_mails(idle_client)
    idle_client.post(f"/tasks/{task_id}/cancel")
    response = idle_client.post(f"/tasks/{task_id}/retry")
    assert response.status_code == 202
    assert response.headers["location"] == f"/tasks/{task_id}"
    assert response.json().keys() == {"id", "kind", "status", "message", "created_at"}
    assert (response.json()["id"], response.json()["status"]) == (task_id, "queued")
    task = idle_client.get(f"/tasks/{task_id}").json()
    assert (task["status"], task["attempts"], task["finished_at"]) == ("queued", 0, None)


def test_a_failed_task_can_be_retried_and_gets_its_full_time_again(tmp_path: Path) -> None:
    with Service(tmp_path, mail_retry_seconds=0.001, **NOWHERE) as service:
        (task_id,) = queue_mails(service.client)
        failed = service.wait_for(task_id, "failed")
        service.post(f"/tasks/{task_id}/retry").raise_for_status()
        again = service.wait_for(task_id, "failed")
        assert failed["attempts"] == again["attempts"] == 1
        assert again["gives_up_at"] > failed["gives_up_at"]
        assert service.log.count('"task failed"') == 2


def test_a_waiting_task_cannot_be_retried(idle_client: TestClient) -> None:
    (task_id,) = queue_mails(idle_client)
    problem_of(idle_client.post(f"/tasks/{task_id}/retry"), 409)


def test_a_task_that_succeeded_cannot_be_retried(client: TestClient) -> None:
    (task_id,) = queue_mails(client)
    wait_for(client, task_id)
    problem_of(client.post(f"/tasks/{task_id}/retry"), 409)


# Events, on a real server.


@contextmanager
def events(service: Service, path: str) -> Iterator[Iterator[Json]]:
    """Follow a stream, which has begun when the block begins; yield the tasks in its events."""
    with httpx2.stream("GET", service.url + path, timeout=PATIENCE) as stream:
        assert stream.status_code == 200
        assert stream.headers["content-type"].startswith("text/event-stream")
        assert stream.headers["cache-control"] == "no-store"
        lines = (line.partition("data: ") for line in stream.iter_lines())
        yield (json.loads(data) for _, found, data in lines if found)


def test_the_stream_of_a_task_goes_on_until_the_task_is_finished(service: Service) -> None:
    (task_id,) = queue_mails(service.client)
    with events(service, f"/tasks/{task_id}/events") as changes:
        seen = list(changes)
    assert {task["id"] for task in seen} == {task_id}
    assert seen[-1] | {"history": []} == service.get(f"/tasks/{task_id}").json()
    assert seen[-1]["status"] == "succeeded"


def test_the_stream_of_a_finished_task_has_a_single_event(service: Service) -> None:
    (task_id,) = queue_mails(service.client)
    service.wait_for(task_id)
    with events(service, f"/tasks/{task_id}/events") as changes:
        assert [task["status"] for task in changes] == ["succeeded"]


def test_the_stream_of_all_tasks_has_every_change(service: Service) -> None:
    with events(service, "/events") as changes:
        waiting = set(queue_mails(service.client, 3))
        stories: dict[str, list[str]] = {task_id: [] for task_id in waiting}
        for task in changes:
            stories[task["id"]].append(task["status"])
            if task["status"] == "succeeded":
                waiting.discard(task["id"])
            if not waiting:
                break
    assert list(stories.values()) == [["queued", "running", "succeeded"]] * 3


@pytest.mark.thorough
def test_a_cancellation_ends_the_stream_of_its_task(tmp_path: Path) -> None:
    with Service(tmp_path, worker_concurrency=0) as service:
        (task_id,) = queue_mails(service.client)
        with events(service, f"/tasks/{task_id}/events") as changes:
            service.post(f"/tasks/{task_id}/cancel")
            assert [task["status"] for task in changes] == ["queued", "cancelled"]


@pytest.mark.thorough
def test_a_change_without_an_event_is_noticed_all_the_same(tmp_path: Path) -> None:
    """A process may change a task, and die before it publishes the event."""
    with Service(tmp_path, worker_concurrency=0) as service:
        task_id, other = queue_mails(service.client, 2)
        with events(service, f"/tasks/{task_id}/events") as changes:
            assert next(changes)["status"] == "queued"
            with closing(sqlite3.connect(tmp_path / "queue.db")) as database, database:
                database.execute(
                    "UPDATE tasks SET status = 'cancelled', updated_at = updated_at + 1 "
                    "WHERE id = ?",
                    (task_id,),
                )
            service.post(f"/tasks/{other}/cancel")
            assert [task["status"] for task in changes] == ["cancelled"]


@pytest.mark.thorough
def test_an_open_event_stream_does_not_delay_the_stop(tmp_path: Path) -> None:
    with Service(tmp_path, worker_concurrency=0, shutdown_grace_seconds=600) as service:
        (task_id,) = queue_mails(service.client)
        with (
            events(service, "/events") as all_changes,
            events(service, f"/tasks/{task_id}/events") as changes,
        ):
            exit_code = service.stop()  # long before the grace period is over
            assert list(all_changes) == []
            assert [task["status"] for task in changes] == ["queued"]
    assert exit_code == 0
