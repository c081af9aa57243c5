"""Idempotency-Key: a client that got no response repeats its request, which queues tasks once."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import pytest
from fastapi.testclient import TestClient

from afterward.errors import QueueUnavailable
from app.main import create_app
from tests.api.requests import COURTESIES, PROMISES, Call, problem_of, upload_of
from tests.support.service import Service, files_below, settings_in, wait_for

KEY = "8e03978e-40d5-43e8-bc93-6894a57f9324"
DAY = 24 * 3600

NOTIFICATION = PROMISES[0]


def send(client: httpx2.Client, call: Call, key: str = KEY) -> httpx2.Response:
    return call.send(client, **{"Idempotency-Key": key})


def is_first(response: httpx2.Response) -> bool:
    return response.status_code == 202 and "idempotency-replay" not in response.headers


def is_replay(response: httpx2.Response, of: httpx2.Response) -> bool:
    """Return whether a response repeats the first response, and says that it does."""
    return (
        response.status_code == 202
        and response.headers["idempotency-replay"] == "true"
        and response.json() == of.json()
        and response.headers.get("location") == of.headers.get("location")
    )


def all_tasks(client: httpx2.Client) -> list[str]:
    return [task["id"] for task in client.get("/tasks").json()["data"]]


@pytest.mark.parametrize("call", PROMISES + COURTESIES, ids=lambda call: call.path)
def test_a_repeated_request_gets_the_first_response_again(client: TestClient, call: Call) -> None:
    first, *others = [send(client, call) for _ in range(3)]
    assert is_first(first)
    assert all(is_replay(other, of=first) for other in others)
    assert len(all_tasks(client)) == (1 if call.kind else 0)


def test_a_replay_shows_the_task_as_it_was_queued_even_if_it_is_done(client: TestClient) -> None:
    first = send(client, NOTIFICATION)
    wait_for(client, first.json()["id"])
    assert send(client, NOTIFICATION).json()["status"] == "queued"


def test_a_replay_adds_no_background_task(client: TestClient, tmp_path: Path) -> None:
    for _ in range(3):
        send(client, NOTIFICATION)
    assert (tmp_path / "log.txt").read_text() == "message to ada@example.com\n"


def test_a_repeated_upload_leaves_one_upload_and_one_file(
    client: TestClient, tmp_path: Path
) -> None:
    first, second = send(client, upload_of()), send(client, upload_of())
    assert is_replay(second, of=first)
    wait_for(client, first.json()["id"])
    (upload,) = client.get("/uploads").json()["data"]
    assert files_below(tmp_path / "uploads") == [f"published/{upload['id']}"]


@pytest.mark.parametrize(
    ("first", "other"),
    [
        (NOTIFICATION, Call("/send-notification/eve@example.com")),
        (NOTIFICATION, Call(NOTIFICATION.path, {"json": {"subject": "Other"}})),
        (NOTIFICATION, Call(NOTIFICATION.path + "?q=other")),
        (NOTIFICATION, Call("/items/7")),
        (upload_of(b"one"), upload_of(b"two")),
        (upload_of(name="one.txt"), upload_of(name="two.txt")),
        (upload_of(), NOTIFICATION),
    ],
)
def test_a_key_cannot_be_used_for_a_different_request(
    client: TestClient, tmp_path: Path, first: Call, other: Call
) -> None:
    task = send(client, first).json()
    wait_for(client, task["id"])
    before = all_tasks(client), files_below(tmp_path / "uploads")
    (error,) = problem_of(send(client, other), 422)["errors"]
    assert error["pointer"] == "/Idempotency-Key"
    assert (all_tasks(client), files_below(tmp_path / "uploads")) == before


def test_requests_with_different_keys_or_without_keys_are_different_requests(
    client: TestClient,
) -> None:
    assert is_first(send(client, NOTIFICATION, "one"))
    assert is_first(send(client, NOTIFICATION, "two"))
    assert is_first(NOTIFICATION.send(client))
    assert is_first(NOTIFICATION.send(client))
    assert len(all_tasks(client)) == 4


@pytest.mark.parametrize("key", ["!", "~", "x" * 255, "a-b_c:d/e", "{7}"])
def test_a_key_is_the_same_with_and_without_quotes(client: TestClient, key: str) -> None:
    first = send(client, NOTIFICATION, key)
    assert is_first(first)
    assert is_replay(send(client, NOTIFICATION, f'"{key}"'), of=first)


MALFORMED_KEYS = [
    b"",
    b" ",
    b'"',
    b'""',
    b'"open',
    b'"two" "keys"',
    b"two keys",
    b"a\ttab",
    b"\x7f",
    b"\xff",
    "é".encode(),
    "é".encode("latin-1"),
    b"x" * 256,
]


@pytest.mark.parametrize("key", MALFORMED_KEYS)
@pytest.mark.parametrize("call", [NOTIFICATION, upload_of()], ids=lambda call: call.path)
def test_a_malformed_key_is_refused(client: TestClient, call: Call, key: bytes) -> None:
    problem_of(client.post(call.path, headers={b"Idempotency-Key": key}, **call.options), 400)
    assert all_tasks(client) == []


def test_a_refused_request_does_not_use_up_its_key(client: TestClient) -> None:
    problem_of(send(client, Call("/send-notification/nobody")), 422)
    problem_of(send(client, Call(NOTIFICATION.path, {"content": b"{"})), 400, 415)
    assert is_first(send(client, NOTIFICATION))


@pytest.mark.parametrize("call", [NOTIFICATION, upload_of()], ids=lambda call: call.path)
def test_a_request_whose_commit_failed_does_not_use_up_its_key(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, call: Call
) -> None:
    async def refuse(*_: object) -> None:
        raise QueueUnavailable

    with monkeypatch.context() as refusing:
        refusing.setattr(client.app_state["queue"].engine, "put", refuse)
        problem_of(send(client, call), 503)
    assert is_first(send(client, call))


def test_a_key_is_still_known_after_a_restart(tmp_path: Path) -> None:
    settings = settings_in(tmp_path)
    with TestClient(create_app(settings)) as client:
        first = send(client, NOTIFICATION)
    with TestClient(create_app(settings)) as client:
        assert is_replay(send(client, NOTIFICATION), of=first)


def test_a_key_lives_for_24_hours(client: TestClient) -> None:
    queue, began = client.app_state["queue"], time.time()
    first = send(client, NOTIFICATION)
    queue.now = lambda: began + DAY - 60
    assert is_replay(send(client, NOTIFICATION), of=first)
    queue.now = lambda: began + DAY + 60
    assert is_first(send(client, NOTIFICATION))


def test_a_repeated_retry_request_retries_the_task_once(idle_client: TestClient) -> None:
    client = idle_client
    task = NOTIFICATION.send(client).json()
    client.post(f"/tasks/{task['id']}/cancel")
    retry = Call(f"/tasks/{task['id']}/retry")
    first = send(client, retry)
    assert is_first(first)
    assert is_replay(send(client, retry), of=first)
    problem_of(send(client, retry, "another key"), 400)
    problem_of(send(client, retry, "another-key"), 409)


# Concurrent requests, on a real server.


def test_a_second_request_during_the_first_is_answered_409_with_retry_after(
    service: Service,
) -> None:
    go_on = threading.Event()

    def slow_body() -> Iterator[bytes]:
        yield b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.txt"\r\n\r\n'
        go_on.wait(5)
        yield b"slow\r\n--b--\r\n"

    form = {"Content-Type": "multipart/form-data; boundary=b"}
    slow = Call("/upload", {"content": slow_body()})
    with ThreadPoolExecutor() as pool:
        first = pool.submit(slow.send, service.client, **form, **{"Idempotency-Key": "slow"})
        while not files_below(service.directory / "uploads" / "incoming"):
            time.sleep(0.01)
        second = send(service.client, NOTIFICATION, "slow")
        go_on.set()
        assert is_first(first.result())
    problem_of(second, 409)
    assert int(second.headers["retry-after"]) >= 1


@pytest.mark.parametrize("call", [NOTIFICATION, upload_of()], ids=lambda call: call.path)
def test_a_hundred_concurrent_requests_with_the_same_key_make_one_task(
    service: Service, call: Call
) -> None:
    key = f"at-once-{call.kind}"
    before = set(all_tasks(service.client))
    with ThreadPoolExecutor(20) as pool:
        responses = list(pool.map(lambda _: send(service.client, call, key), range(100)))
    answered = [response for response in responses if response.status_code == 202]
    waiting = [response for response in responses if response.status_code != 202]
    assert [is_first(response) for response in answered].count(True) == 1
    assert {response.json()["id"] for response in answered} == (
        set(all_tasks(service.client)) - before
    )
    for response in waiting:
        problem_of(response, 409)


def test_the_documentation_names_the_header_for_every_route_that_queues_tasks(
    idle_client: TestClient,
) -> None:
    paths = idle_client.get("/openapi.json").json()["paths"]
    for path, operations in paths.items():
        for method, operation in operations.items():
            names = [parameter["name"] for parameter in operation.get("parameters", [])]
            assert ("Idempotency-Key" in names) == ("202" in operation["responses"]), (path, method)
