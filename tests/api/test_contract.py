"""The contract with clients: routes, status codes, headers, and all fields of the responses."""

import re
from datetime import datetime, timedelta

import pytest
from fastapi.routing import APIRoute
from fastapi.testclient import TestClient

from afterward.retry import RetryPolicy
from app.main import create_app
from app.settings import Settings
from app.tasks import registry
from tests.api.requests import COURTESIES, PROMISES, Call, problem_of, upload_of
from tests.support.service import PATIENCE, Service, settings_in, wait_for
from tests.support.smtp_server import SmtpServer

QUEUED = {"id", "kind", "status", "message", "created_at"}
TASK = QUEUED - {"message"} | {
    "attempts",
    "max_attempts",
    "gives_up_at",
    "updated_at",
    "started_at",
    "finished_at",
    "next_attempt_at",
    "progress",
    "result",
    "error",
    "about",
    "batch_id",
    "request_id",
    "worker",
}
UPLOAD = {"id", "filename", "size", "sha256", "content_type"}
SHA256_OF_HELLO = "185f8db32271fe25f561a6fc938b2e264306ec304eda518007d1764826381969"

each_promise = pytest.mark.parametrize("call", PROMISES, ids=lambda call: call.path)
each_call = pytest.mark.parametrize("call", PROMISES + COURTESIES, ids=lambda call: call.path)


def is_utc(time: str) -> bool:
    """Return whether a time has the form of RFC 3339, in UTC."""
    pattern = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z"
    return bool(re.fullmatch(pattern, time)) and datetime.fromisoformat(time).utcoffset() == (
        timedelta()
    )


# Responses to requests that queue a task.


def test_each_route_that_answers_202_has_a_valid_request() -> None:
    """A batch and a retry have tests of their own, in test_batches.py and test_tasks.py."""
    paths = [call.path.partition("?")[0] for call in PROMISES + COURTESIES]
    without_request = {
        route.path
        for route in create_app(Settings(_env_file=None)).routes
        if isinstance(route, APIRoute)
        and route.status_code == 202
        and route.include_in_schema
        and not any(route.path_regex.match(path) for path in paths)
    }
    assert without_request == {"/send-notifications", "/tasks/{task_id}/retry"}, (
        "add a valid request for the new route to PROMISES in tests/api/requests.py"
    )


@each_promise
def test_a_promise_is_answered_with_202_and_the_task(client: TestClient, call: Call) -> None:
    response = call.send(client)
    queued = response.json()
    assert response.status_code == 202
    assert response.headers["content-type"] == "application/json"
    assert response.headers["location"] == f"/tasks/{queued['id']}"
    assert queued.keys() - {"upload", "item_id"} == QUEUED
    assert (queued["kind"], queued["status"]) == (call.kind, "queued")
    assert queued["message"].split()[1] == "queued", "say what is queued: 'Upload queued'"
    assert is_utc(queued["created_at"])


@each_promise
def test_the_location_header_leads_to_the_task(client: TestClient, call: Call) -> None:
    response = call.send(client)
    task = wait_for(client, response.json()["id"], call.ends)
    assert client.get(response.headers["location"]).json() == task
    assert task.keys() == TASK | {"history"}
    assert task["attempts"] == 1
    assert (task["error"] is None) == (call.ends == "succeeded") == (task["history"] == [])
    # The bound is that of the kind's policy; tests/tasks/test_registry.py has a table of them.
    policy = registry(Settings(_env_file=None)).policy(str(call.kind)) or RetryPolicy()
    by_time = policy.give_up_after is not None
    assert task["max_attempts"] == (None if by_time else policy.attempts)
    assert by_time == (task["gives_up_at"] is not None)
    assert task["created_at"] == response.json()["created_at"]
    moments = [task[name] for name in ("created_at", "started_at", "finished_at")]
    assert all(map(is_utc, [*moments, task["updated_at"]]))
    assert moments == sorted(moments)
    assert task["next_attempt_at"] is None


@pytest.mark.parametrize("call", COURTESIES, ids=lambda call: call.path)
def test_a_courtesy_is_answered_with_202_and_a_message(client: TestClient, call: Call) -> None:
    response = call.send(client)
    assert response.status_code == 202
    assert response.json().keys() == {"message"}
    assert response.json()["message"].endswith("queued")
    assert "location" not in response.headers
    assert client.get("/tasks").json() == {"data": [], "has_more": False}


@each_call
def test_a_trailing_slash_makes_no_difference(client: TestClient, call: Call) -> None:
    first, second = call.send(client), call.with_other_slash().send(client)
    assert first.status_code == second.status_code == 202
    assert first.json().keys() == second.json().keys()


def test_the_message_of_a_notification_says_that_it_is_queued(client: TestClient) -> None:
    response = client.post("/send-notification/ada@example.com")
    assert response.json()["message"] == "Notification queued"


@pytest.mark.parametrize("charset", ["utf-8", '"UTF-8"', "us-ascii"])
def test_the_charset_utf_8_is_accepted_for_json(client: TestClient, charset: str) -> None:
    headers = {"Content-Type": f"application/json;charset={charset}"}
    response = client.post(PROMISES[0].path, content=b"{}", headers=headers)
    assert response.status_code == 202


def test_an_item_is_answered_with_its_number(client: TestClient) -> None:
    assert client.post("/items/7").json()["item_id"] == 7


def test_an_upload_is_answered_with_its_name_size_and_hash(client: TestClient) -> None:
    upload = upload_of().send(client).json()["upload"]
    assert upload.keys() == UPLOAD
    assert upload["filename"] == "hello.txt"
    assert upload["size"] == 5
    assert upload["sha256"] == SHA256_OF_HELLO
    assert upload["content_type"] == "text/plain"


def test_a_refused_mail_fails_with_its_smtp_code(
    tmp_path_factory: pytest.TempPathFactory, smtp_server: SmtpServer
) -> None:
    smtp_server.always["rcpt"] = "550 5.1.1 Nobody of this name"
    settings = settings_in(
        tmp_path_factory.mktemp("refused"), catcher=False, smtp_port=smtp_server.port
    )
    with TestClient(create_app(settings)) as client:
        queued = client.post("/send-notification/ada@example.com").json()
        task = wait_for(client, queued["id"], "failed")
    assert task["error"].keys() == {"type", "detail", "smtp_code"}
    assert task["error"]["smtp_code"] == 550
    assert (task["attempts"], task["result"]) == (1, None)


def test_a_deferred_mail_waits_for_its_next_attempt(
    tmp_path_factory: pytest.TempPathFactory, smtp_server: SmtpServer
) -> None:
    smtp_server.always["rcpt"] = "450 4.2.1 Later"
    settings = settings_in(
        tmp_path_factory.mktemp("deferred"),
        catcher=False,
        smtp_port=smtp_server.port,
        retry_base_seconds=1000,
    )
    with TestClient(create_app(settings)) as client:
        queued = client.post("/send-notification/ada@example.com").json()
        task = wait_for(client, queued["id"], "retrying")
    assert task["error"]["smtp_code"] == 450
    assert is_utc(task["next_attempt_at"])
    assert task["next_attempt_at"] > task["updated_at"]
    assert task["finished_at"] is None


# Lists and pages.


def test_tasks_are_listed_in_pages(client: TestClient) -> None:
    queued = client.post("/send-notification/ada@example.com").json()
    wait_for(client, queued["id"])
    page = client.get("/tasks").json()
    assert page.keys() == {"data", "has_more"}
    read = client.get(f"/tasks/{queued['id']}").json()
    assert read.pop("history") == []
    assert page["data"] == [read]


def test_an_upload_is_listed_and_read_with_its_status(client: TestClient) -> None:
    queued = upload_of().send(client).json()
    wait_for(client, queued["id"])
    (listed,) = client.get("/uploads").json()["data"]
    assert listed == client.get(f"/uploads/{queued['upload']['id']}").json()
    assert listed.keys() == UPLOAD | {"status", "created_at"}
    assert listed.items() >= queued["upload"].items()
    assert listed["status"] == "published"
    assert is_utc(listed["created_at"])


@pytest.mark.parametrize(
    ("path", "media_type"),
    [
        ("/", "text/html"),
        ("/docs", "text/html"),
        ("/openapi.json", "application/json"),
        ("/livez", "text/plain"),
        ("/readyz", "application/json"),
        ("/metrics", "text/plain"),
        ("/tasks", "application/json"),
        ("/uploads", "application/json"),
        ("/inbox", "application/json"),
        ("/inbox/", "application/json"),
    ],
)
def test_a_page_has_the_expected_media_type(client: TestClient, path: str, media_type: str) -> None:
    response = client.get(path)
    assert response.status_code == 200
    assert response.headers["content-type"].partition(";")[0] == media_type


@pytest.mark.parametrize(
    "path",
    ["/livez", "/readyz", "/metrics", "/tasks", "/uploads", "/inbox", "/openapi.json", "/nowhere"],
)
def test_a_response_of_text_ends_with_a_newline(client: TestClient, path: str) -> None:
    """The newline lets a shell's prompt after curl begin on a new line."""
    response = client.get(path)
    assert response.content.endswith(b"\n")
    assert not response.content.endswith(b"\n\n")
    assert response.headers["content-length"] == str(len(response.content))


@each_call
def test_a_202_and_its_replay_end_with_a_newline(client: TestClient, call: Call) -> None:
    first = call.send(client, **{"Idempotency-Key": "k1"})
    assert first.content.endswith(b"}\n")
    assert first.headers["content-length"] == str(len(first.content))
    again = call.send(client, **{"Idempotency-Key": "k1"})
    assert again.headers["idempotency-replay"] == "true"
    assert again.content == first.content


def test_a_response_without_a_body_has_no_newline(client: TestClient) -> None:
    upload = upload_of().send(client).json()
    wait_for(client, upload["id"])
    deleted = client.delete(f"/uploads/{upload['upload']['id']}")
    assert (deleted.status_code, deleted.content) == (204, b"")
    assert "content-type" not in deleted.headers


# The request id.


@pytest.mark.parametrize("valid", ["7f3a", "A-b_c.d:e/f+g=h@i", "x" * 128])
def test_a_valid_request_id_is_echoed(client: TestClient, valid: str) -> None:
    assert client.get("/livez", headers={"X-Request-ID": valid}).headers["x-request-id"] == valid


@pytest.mark.parametrize(
    "invalid", [b"", b"two words", b"x" * 129, b"\xc3\xa9", b'"quoted"', b"%0d%0a", b"a\tb"]
)
def test_an_invalid_request_id_is_replaced(client: TestClient, invalid: bytes) -> None:
    made = client.get("/livez", headers={b"X-Request-ID": invalid}).headers["x-request-id"]
    assert re.fullmatch("[0-9a-f]{32}", made)


def test_every_request_gets_a_unique_id(client: TestClient) -> None:
    ids = {client.get("/livez").headers["x-request-id"] for _ in range(3)}
    assert len(ids) == 3


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/nowhere", 404), ("PUT", "/livez", 405), ("POST", "/send-email/", 422)],
)
def test_errors_have_the_request_id_too(
    client: TestClient, method: str, path: str, status: int
) -> None:
    response = client.request(method, path, headers={"X-Request-ID": "7f3a"})
    problem_of(response, status)
    assert response.headers["x-request-id"] == "7f3a"


# The documentation.


def test_the_documentation_shows_every_error_as_a_problem(client: TestClient) -> None:
    for path, operations in client.get("/openapi.json").json()["paths"].items():
        for operation in operations.values():
            for status, response in operation["responses"].items():
                if status >= "400" and path != "/readyz":
                    assert list(response["content"]) == ["application/problem+json"], path


def test_the_documentation_of_a_notification_has_an_example(client: TestClient) -> None:
    schema = client.get("/openapi.json").json()["components"]["schemas"]["Notification"]
    (example,) = schema["examples"]
    assert client.post("/send-notification/ada@example.com", json=example).status_code == 202


# Promises and courtesies on a real server.


@each_call
def test_a_real_server_answers_in_the_same_way(service: Service, call: Call) -> None:
    response = call.with_other_slash().send(service.client)
    assert response.status_code == 202
    assert response.elapsed < timedelta(seconds=PATIENCE)
    if call.kind:
        assert service.wait_for(response.json()["id"], call.ends)["kind"] == call.kind
