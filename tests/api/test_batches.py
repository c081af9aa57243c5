"""Batches: a mail to many recipients is queued as a whole or not at all, and has one status."""

import asyncio
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pytest
from fastapi.testclient import TestClient

from afterward.errors import QueueUnavailable
from app.api.routes import batches
from tests.api.requests import problem_of
from tests.support.gate import served
from tests.support.service import PATIENCE, Json, Service, mails_in

ENGINES = ["sqlite", "postgresql"]

ADA, GRACE, EVE = "ada@example.com", "grace@example.com", "eve@example.net"
LONGEST = ("{:064}@" + ".".join(["d" * 61] * 3) + ".com").format
COUNTS = {"queued", "running", "retrying", "succeeded", "failed", "cancelled"}


def send(
    client: httpx2.Client, *recipients: object, key: str | None = None, **fields: object
) -> httpx2.Response:
    headers = {} if key is None else {"Idempotency-Key": key}
    body = {"recipients": recipients, **fields}
    return client.post("/send-notifications", json=body, headers=headers)


def counted(client: httpx2.Client, batch: httpx2.Response) -> Json:
    """Return the status of a batch, without its id and without counts of zero."""
    view: Json = client.get(batch.headers["location"]).raise_for_status().json()
    assert view.keys() == {"id", "total", "progress"} | COUNTS
    assert view.pop("id") == batch.json()["id"]
    assert sum(view[status] for status in COUNTS) == view["total"]
    return {name: number for name, number in view.items() if number}


def until_finished(client: httpx2.Client, batch: httpx2.Response) -> Json:
    deadline = time.monotonic() + PATIENCE
    while (view := counted(client, batch)).get("progress") != 1:
        assert time.monotonic() < deadline, view
        time.sleep(0.01)
    return view


def nothing_is_queued(client: httpx2.Client) -> bool:
    return not client.get("/tasks").json()["data"]


# Accepted batches.


def test_a_batch_is_answered_with_202_and_a_task_for_each_recipient(
    idle_client: TestClient,
) -> None:
    response = send(idle_client, GRACE, ADA)
    batch = response.json()
    assert response.status_code == 202
    assert response.headers["location"] == f"/batches/{batch['id']}"
    assert batch.keys() == {"id", "total", "tasks"}
    assert batch["total"] == 2
    assert [task["email"] for task in batch["tasks"]] == [GRACE, ADA]
    newest_first = [task["id"] for task in idle_client.get("/tasks").json()["data"]]
    assert newest_first[::-1] == [task["id"] for task in batch["tasks"]]
    assert counted(idle_client, response) == {"total": 2, "queued": 2}


def test_each_recipient_gets_a_separate_mail(client: TestClient, tmp_path: Path) -> None:
    batch = send(client, ADA, GRACE, subject="Hello", message="It is done.")
    assert until_finished(client, batch) == {"total": 2, "succeeded": 2, "progress": 1}
    mails = mails_in(tmp_path)
    assert sorted(mail.recipients for mail in mails) == [(ADA,), (GRACE,)]
    assert {mail.subject for mail in mails} == {"Hello"}


def test_a_recipient_that_is_named_twice_gets_two_mails(idle_client: TestClient) -> None:
    tasks = send(idle_client, ADA, GRACE, ADA).json()["tasks"]
    assert [task["email"] for task in tasks] == [ADA, GRACE, ADA]
    assert len({task["id"] for task in tasks}) == 3


def test_a_trailing_slash_makes_no_difference(idle_client: TestClient) -> None:
    response = idle_client.post("/send-notifications/", json={"recipients": [ADA]})
    assert response.status_code == 202
    assert counted(idle_client, response) == {"total": 1, "queued": 1}


def test_a_batch_can_have_a_thousand_addresses_of_the_greatest_length(
    idle_client: TestClient,
) -> None:
    recipients = [LONGEST(number) for number in range(1000)]
    assert {len(address) for address in recipients} == {254}
    batch = send(idle_client, *recipients)
    assert [task["email"] for task in batch.json()["tasks"]] == recipients
    assert counted(idle_client, batch) == {"total": 1000, "queued": 1000}


def test_a_batch_writes_a_single_line_to_the_log_file(client: TestClient, tmp_path: Path) -> None:
    send(client, ADA, GRACE)
    assert (tmp_path / "log.txt").read_text() == "message to a batch of 2\n"


def test_the_example_in_the_documentation_is_accepted(idle_client: TestClient) -> None:
    schema = idle_client.get("/openapi.json").json()["components"]["schemas"]["Notifications"]
    (example,) = schema["examples"]
    assert idle_client.post("/send-notifications", json=example).status_code == 202


# Refused batches, of which no task is queued.


def test_each_invalid_recipient_is_named(idle_client: TestClient) -> None:
    one = "must be one email address, such as ada@example.com"
    errors = problem_of(send(idle_client, ADA, "nobody", GRACE, f"Eve <{EVE}>"), 422)["errors"]
    assert errors == [{"pointer": f"/recipients/{n}", "detail": one} for n in (1, 3)]
    errors = problem_of(send(idle_client, ADA, 7, "x" * 321), 422)["errors"]
    assert [error["pointer"] for error in errors] == ["/recipients/1", "/recipients/2"]
    assert nothing_is_queued(idle_client)


def test_of_many_invalid_recipients_the_first_ten_are_named(idle_client: TestClient) -> None:
    """The limit keeps the problem small."""
    errors = problem_of(send(idle_client, *["x" * 254] * 1000), 422)["errors"]
    assert [error["pointer"] for error in errors] == [f"/recipients/{n}" for n in range(10)]


@pytest.mark.parametrize("recipients", [[], [ADA] * 1001, ["x"] * 100_000, ADA, {"0": ADA}, None])
def test_a_batch_needs_between_one_and_a_thousand_recipients(
    idle_client: TestClient, recipients: object
) -> None:
    response = idle_client.post("/send-notifications", json={"recipients": recipients})
    (error,) = problem_of(response, 422)["errors"]
    assert error["pointer"] == "/recipients"
    assert nothing_is_queued(idle_client)


@pytest.mark.parametrize(
    ("field", "value"),
    [("subject", "a\nb"), ("subject", "x" * 201), ("message", "\0"), ("html", "<p>"), ("to", ADA)],
)
def test_the_other_fields_have_the_rules_of_a_single_notification(
    idle_client: TestClient, field: str, value: str
) -> None:
    (error,) = problem_of(send(idle_client, ADA, **{field: value}), 422)["errors"]
    assert error["pointer"] == f"/{field}"
    assert nothing_is_queued(idle_client)


def test_a_small_request_cannot_make_the_service_store_gigabytes(idle_client: TestClient) -> None:
    """Each task stores its own copy of the message."""
    just_fits = "x" * (batches.MOST_TEXT // 100)
    (error,) = problem_of(send(idle_client, *[ADA] * 100, message=just_fits + "x"), 422)["errors"]
    assert error == {
        "pointer": "/message",
        "detail": "must have at most 40000 characters for 100 recipients",
    }
    assert nothing_is_queued(idle_client)
    assert send(idle_client, *[ADA] * 100, message=just_fits).status_code == 202


@contextmanager
def idle(directory: Path, queue_url: str, **settings: object) -> Iterator[TestClient]:
    """Run a service without a worker."""
    with served(directory, queue_url=queue_url, worker_concurrency=0, **settings) as client:
        yield client


def test_a_recipient_who_is_not_allowed_makes_the_whole_batch_refused(
    tmp_path: Path, queue_url: str
) -> None:
    with idle(tmp_path, queue_url, allowed_recipients="*@example.com") as client:
        problem = problem_of(send(client, ADA, EVE, GRACE), 403)
        assert EVE not in problem["detail"]
        assert nothing_is_queued(client)
        assert send(client, ADA, GRACE).status_code == 202


def test_the_backlog_needs_room_for_the_whole_batch(tmp_path: Path, queue_url: str) -> None:
    with idle(tmp_path, queue_url, max_backlog=3) as client:
        problem_of(send(client, *[ADA] * 4), 503)
        assert nothing_is_queued(client)
        assert send(client, *[ADA] * 2).status_code == 202
        problem_of(send(client, *[ADA] * 2), 503)
        assert send(client, ADA).status_code == 202


def test_a_commit_that_fails_queues_nothing(
    idle_client: TestClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(*_: object) -> None:
        raise QueueUnavailable

    with monkeypatch.context() as refusing:
        refusing.setattr(idle_client.app_state["queue"].engine, "put", refuse)
        response = send(idle_client, ADA, GRACE)
    problem_of(response, 503)
    assert "location" not in response.headers
    assert nothing_is_queued(idle_client)
    assert not (tmp_path / "log.txt").exists()


@pytest.mark.anyio
async def test_other_requests_run_while_a_batch_is_validated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The validation yields to the event loop after each TURN_SECONDS."""
    monkeypatch.setattr(batches, "PAUSE_AFTER", 0.0)
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    waiting = asyncio.create_task(others())
    assert [item async for item in batches._with_pauses("abc")] == ["a", "b", "c"]
    waiting.cancel()
    assert turns >= 2


# Repeated requests.


def test_a_repeated_batch_gets_the_first_response_again(idle_client: TestClient) -> None:
    first, again = (send(idle_client, ADA, GRACE, key="monday") for _ in range(2))
    assert "idempotency-replay" not in first.headers
    assert again.headers["idempotency-replay"] == "true"
    assert again.headers["location"] == first.headers["location"]
    assert again.json() == first.json()
    assert counted(idle_client, again) == {"total": 2, "queued": 2}
    (error,) = problem_of(send(idle_client, ADA, EVE, key="monday"), 422)["errors"]
    assert error["pointer"] == "/Idempotency-Key"
    assert len(idle_client.get("/tasks").json()["data"]) == 2


# The status of a batch.


def test_the_counts_of_a_batch_follow_its_tasks(idle_client: TestClient) -> None:
    batch = send(idle_client, *[ADA] * 4)
    send(idle_client, GRACE)
    first = batch.json()["tasks"][0]["id"]
    idle_client.post(f"/tasks/{first}/cancel").raise_for_status()
    assert counted(idle_client, batch) == {
        "total": 4,
        "queued": 3,
        "cancelled": 1,
        "progress": 0.25,
    }
    idle_client.post(f"/tasks/{first}/retry").raise_for_status()
    assert counted(idle_client, batch) == {"total": 4, "queued": 4}


def test_mails_that_wait_for_a_retry_are_counted_as_retrying(
    tmp_path: Path, queue_url: str
) -> None:
    settings = {"catcher": False, "smtp_port": 1, "retry_base_seconds": 3600}
    with served(tmp_path, queue_url=queue_url, **settings) as client:
        batch = send(client, ADA, GRACE)
        deadline = time.monotonic() + PATIENCE
        while counted(client, batch) != {"total": 2, "retrying": 2}:
            assert time.monotonic() < deadline
            time.sleep(0.01)


@pytest.mark.parametrize("batch_id", ["unknown", "01900000-0000-7000-8000-000000000000"])
def test_an_unknown_batch_is_not_found(idle_client: TestClient, batch_id: str) -> None:
    assert "batch" in problem_of(idle_client.get(f"/batches/{batch_id}"), 404)["detail"]


def test_the_id_of_a_task_is_not_the_id_of_a_batch(idle_client: TestClient) -> None:
    task = idle_client.post(f"/send-notification/{ADA}").json()["id"]
    problem_of(idle_client.get(f"/batches/{task}"), 404)


def test_a_nul_in_the_id_of_a_batch_is_refused_before_the_database_sees_it(
    idle_client: TestClient,
) -> None:
    problem_of(idle_client.get("/batches/a%00"), 422)


@pytest.mark.thorough
def test_a_reader_of_events_is_kept_while_a_large_batch_arrives(tmp_path: Path) -> None:
    """A thousand events at once do not make the stream drop its reader."""
    with (
        Service(tmp_path, worker_concurrency=0) as service,
        service.client.stream("GET", "/events") as stream,
    ):
        tasks = send(service.client, *[ADA] * 1000).json()["tasks"]
        last = service.post(f"/send-notification/{GRACE}").json()
        events = (line for line in stream.iter_lines() if line.startswith("data: "))
        seen = [json.loads(next(events).removeprefix("data: "))["id"] for _ in range(1001)]
    assert seen == [*(task["id"] for task in tasks), last["id"]]
