"""Clients with a key of their own, or without a key, look for data of other clients.

A request for data of another client is answered like one for missing data. Forged addresses have
no effect. Health checks and errors reveal no software, path or reason. Web pages of other origins
cannot use the service.
"""

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx2
import pytest
from fastapi.testclient import TestClient

from afterward.engines.sqlite.engine import SQLite
from afterward.errors import QueueUnavailable
from tests.api.requests import problem_of
from tests.support.gate import bearing, served
from tests.support.service import Json, Service
from tests.support.smtp_server import SmtpServer
from tests.support.torture import Tried
from tests.support.wire import say

TUTORIAL = (sys.executable, "-m", "tests.support.tutorial")
UVICORN = (sys.executable, "-m", "uvicorn", "app.main:app", "--port={port}", "--no-access-log")

ADA, EVE = bearing("ada-key"), bearing("eve-key")
KEYS = "ada: ada-key, eve: eve-key"
UNKNOWN = "01900000-0000-7000-8000-000000000000"
SECRET = "between Ada and us"


@dataclass(frozen=True)
class Belongings:
    """The ids of a client's data."""

    task: str
    waiting: str
    batch: str
    upload: str

    def requests(self) -> list[tuple[str, str, str]]:
        """Return all requests for this data: method, path, and the same path with an unknown id."""
        ways = [
            ("GET", "/tasks/{}", self.task),
            ("GET", "/tasks/{}/events", self.task),
            ("POST", "/tasks/{}/cancel", self.waiting),
            ("POST", "/tasks/{}/retry", self.waiting),
            ("GET", "/batches/{}", self.batch),
            ("GET", "/uploads/{}", self.upload),
            ("GET", "/uploads/{}/content", self.upload),
            ("GET", "/uploads/{}/content?signed=true", self.upload),
            ("GET", "/uploads/{}/thumbnail", self.upload),
            ("DELETE", "/uploads/{}", self.upload),
        ]
        found = [(method, path.format(thing), path.format(UNKNOWN)) for method, path, thing in ways]
        return [*found, ("GET", "/save-data/ada", "/save-data/nobody")]


def belongings(client: TestClient, headers: dict[str, str]) -> Belongings:
    """Make tasks, a batch and an upload of a client, and return their ids."""
    saved = client.post("/save-data/?user_id=ada", json={"secret": SECRET}, headers=headers).json()
    files = {"file": ("secret.txt", SECRET.encode())}
    upload = client.post("/upload", files=files, headers=headers).json()
    for task in (saved, upload):
        while client.get(f"/tasks/{task['id']}", headers=headers).json()["status"] != "succeeded":
            pass
    # This mail waits, because there is no SMTP server.
    waiting = client.post("/send-email/?email=ada@example.com", headers=headers).json()
    recipients = {"recipients": ["ada@example.com"]}
    batch = client.post("/send-notifications", json=recipients, headers=headers).json()
    return Belongings(saved["id"], waiting["id"], batch["id"], upload["upload"]["id"])


@pytest.fixture
def client(tmp_path: Path) -> Iterator[TestClient]:
    """A service with two clients; mail waits, because there is no SMTP server."""
    with served(tmp_path, api_keys=KEYS, catcher=False, retry_base_seconds=3600) as client:
        yield client


def without_instance(response: httpx2.Response) -> tuple[int, Json, dict[str, str]]:
    """Return a problem's status, body and headers, without the path and the request id."""
    problem: Json = response.json()
    headers = {name: value for name, value in response.headers.items() if name != "content-length"}
    headers.pop("x-request-id")
    return response.status_code, problem | {"instance": ""}, headers


def test_data_of_another_client_is_answered_like_missing_data(
    client: TestClient, tried: Tried
) -> None:
    ada = belongings(client, ADA)
    for method, path, unknown in ada.requests():
        others = client.request(method, path, headers=EVE)
        problem_of(others, 404)
        nobodys = client.request(method, unknown, headers=EVE)
        assert without_instance(others) == without_instance(nobodys)
    # The requests have changed nothing.
    assert client.get(f"/uploads/{ada.upload}/content", headers=ADA).text == SECRET
    assert client.get("/save-data/ada", headers=ADA).json() == {"secret": SECRET}
    assert client.get(f"/tasks/{ada.waiting}", headers=ADA).json()["status"] != "cancelled"
    tried(
        f"{len(ada.requests())} requests for data of another client",
        "404 each, as for missing data",
    )


def test_lists_show_each_client_only_its_own_data(client: TestClient) -> None:
    ada, eve = belongings(client, ADA), belongings(client, EVE)
    for path, thing, others in [
        ("/tasks", eve.task, ada.task),
        ("/tasks?status=succeeded", eve.task, ada.task),
        ("/tasks?kind=save_data", eve.task, ada.task),
        ("/uploads", eve.upload, ada.upload),
    ]:
        ids = [item["id"] for item in client.get(path, headers=EVE).json()["data"]]
        assert thing in ids
        assert others not in ids


def test_a_page_after_the_id_of_another_client_is_like_one_after_an_unknown_id(
    client: TestClient,
) -> None:
    """The page starts at the time in the id, and does not reveal whether the task exists."""
    eve, ada = belongings(client, EVE), belongings(client, ADA)
    never = f"{ada.task[:-1]}{'0' if ada.task[-1] != '0' else '1'}"
    pages = [client.get(f"/tasks?after={after}", headers=EVE).json() for after in (ada.task, never)]
    assert pages[0] == pages[1]
    assert eve.task in [task["id"] for task in pages[0]["data"]]
    uploads = client.get(f"/uploads?after={ada.upload}", headers=EVE).json()["data"]
    assert [upload["id"] for upload in uploads] == [eve.upload]


def test_each_client_has_its_own_idempotency_keys(client: TestClient) -> None:
    """Otherwise a client could get another client's response, or learn of it from a conflict."""
    same = {"Idempotency-Key": "the-same"}
    path, other = "/send-email/?email=a@example.com", "/send-email/?email=b@example.com"
    first = client.post(path, headers=ADA | same)
    for again in (client.post(path, headers=EVE | same), client.post(path, headers=ADA | same)):
        assert again.status_code == 202
    assert client.post(path, headers=ADA | same).json()["id"] == first.json()["id"]
    assert client.post(path, headers=EVE | same).json()["id"] != first.json()["id"]
    problem_of(client.post(other, headers=EVE | same), 422)
    # A client cannot use a key that begins with the other client's name to reach its keys.
    assert client.post(other, headers=EVE | {"Idempotency-Key": "ada-the-same"}).status_code == 202
    spaced = client.post(other, headers=EVE | {"Idempotency-Key": "ada the-same"})
    problem_of(spaced, 400)


def test_data_from_before_the_first_api_key_is_shown_to_no_client(tmp_path: Path) -> None:
    with served(tmp_path, catcher=False, retry_base_seconds=3600) as client:
        old = belongings(client, {})
    with served(tmp_path, catcher=False, retry_base_seconds=3600, api_keys=KEYS) as client:
        for method, path, unknown in old.requests():
            answer = client.request(method, path, headers=ADA)
            assert without_instance(answer) == without_instance(
                client.request(method, unknown, headers=ADA)
            )
        for path in ("/tasks", "/uploads"):
            assert client.get(path, headers=ADA).json()["data"] == []


def test_an_event_stream_shows_each_client_only_its_own_tasks(tmp_path: Path) -> None:
    with (
        Service(tmp_path, api_keys=KEYS) as service,
        service.client.stream("GET", "/events", headers=EVE) as stream,
    ):
        for headers in (ADA, EVE):
            task = service.post("/items/7", headers=headers).json()
            service.client.headers.update(headers)
            service.wait_for(task["id"])
        events = (line for line in stream.iter_lines() if line.startswith("data: "))
        seen = [json.loads(next(events).removeprefix("data: ")) for _ in range(3)]
    assert {event["id"] for event in seen} == {task["id"]}


def test_control_without_keys_every_client_sees_all_data(tmp_path: Path, tried: Tried) -> None:
    with served(tmp_path, catcher=False, retry_base_seconds=3600) as client:
        ada = belongings(client, ADA)
        shown = [
            path
            for method, path, _ in ada.requests()
            if method == "GET" and client.get(path, headers=EVE).is_success
        ]
    assert len(shown) >= 7
    tried("the same without keys", f"{len(shown)} of 8 readable paths are answered")


# Forged addresses


FORGED = ["X-Forwarded-For", "X-Real-IP", "Forwarded", "X-Client-IP", "CF-Connecting-IP"]


def forged(number: int) -> dict[str, str]:
    """Return the headers with which a proxy names the client's address, with a forged address."""
    address = f"203.0.113.{number}"
    return {name: f"for={address}" if name == "Forwarded" else address for name in FORGED}


def admitted_requests(service: Service) -> int:
    """Send six requests, each with a different forged address; return how many are admitted."""
    answers = [service.get("/tasks", headers=forged(number)) for number in range(6)]
    return sum(answer.is_success for answer in answers)


def test_a_forged_address_has_no_effect(tmp_path: Path, tried: Tried) -> None:
    """It changes neither the rate limit of an address nor the log."""
    with Service(tmp_path, rate_limit="2/day") as service:
        number = admitted_requests(service)
        log = service.log
    assert number == 2
    assert '"address":"127.0.0.1"' in log
    assert "203.0.113" not in log
    tried("6 requests from forged addresses at 2/day", f"{number} admitted, 0 addresses in the log")


def test_control_plain_uvicorn_believes_a_forged_address(tmp_path: Path, tried: Tried) -> None:
    """It believes requests from loopback: a proxy's, but also any program's on the machine."""
    with Service(tmp_path, command=UVICORN, rate_limit="2/day") as service:
        number = admitted_requests(service)
    assert number == 6
    tried("the same under `uvicorn app.main:app`", f"{number} admitted")


def test_a_request_is_not_logged_under_the_client_of_the_request_before_it(tmp_path: Path) -> None:
    """A proxy may send requests of several clients through the same connection."""
    head = b"GET /tasks HTTP/1.1\r\nHost: localhost\r\n"
    with Service(tmp_path, api_keys=KEYS) as service:
        said = say(
            service.port,
            head + b"X-API-Key: ada-key\r\n\r\n" + head + b"Connection: close\r\n\r\n",
        )
        (line,) = (line for line in service.log.splitlines() if '"event":"refused"' in line)
    assert said.statuses == [200, 401]
    assert "client" not in json.loads(line)


# Information in health checks and errors


def test_health_checks_reveal_no_reasons_hosts_or_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(_: SQLite) -> None:
        raise QueueUnavailable(f"disk I/O error at {tmp_path}")

    monkeypatch.setattr(SQLite, "check", broken)
    with served(tmp_path, api_keys=KEYS, catcher=False) as client:
        answer = client.get("/readyz")
        assert answer.status_code == 503
        assert answer.json() == {
            "status": "unready",
            "checks": {"database": "failing", "uploads": "ok", "smtp": "degraded"},
        }
        assert client.get("/livez").text == "ok\n"
        for path in ("/", "/tasks", "/metrics", "/inbox", "/events", "/uploads", "/save-data/ada"):
            problem_of(client.get(path), 401)


# Names and versions of software.
SOFTWARE = re.compile(
    r"uvicorn|starlette|fastapi|pydantic|python|h11|httptools|sqlite|afterward|\d+\.\d+\.\d+",
    re.IGNORECASE,
)


def test_errors_reveal_no_software_and_no_version(tmp_path: Path, tried: Tried) -> None:
    with Service(tmp_path, api_keys=KEYS, max_body_bytes=1000, rate_limit="30/day") as service:
        answers = [
            service.get("/nowhere", headers=ADA),
            service.get("/tasks"),
            service.get("/tasks", headers=bearing("x")),
            service.client.delete("/tasks", headers=ADA),
            service.get("/tasks?limit=x", headers=ADA),
            service.post("/process/", headers=ADA, json={"x": "x" * 2000}),
            service.post(
                "/process/", headers=ADA | {"Content-Type": "application/json"}, content=b"{"
            ),
            service.post("/process/", headers=ADA, data={"a": "b"}),
            service.post("/upload", headers=ADA, json={}),
            service.get("/tasks/x", headers=ADA),
            service.get("/livez"),
            *(service.get("/tasks", headers=ADA) for _ in range(30)),
        ]
        raw = say(service.port, b"nonsense\r\n\r\n").raw.decode()
    told = [raw, *(f"{dict(answer.headers)} {answer.text}" for answer in answers)]
    assert {answer.status_code for answer in answers} >= {401, 404, 405, 413, 400, 415, 422, 429}
    assert not [text for text in told if SOFTWARE.search(text)]
    assert all("server" not in answer.headers for answer in answers)
    tried(f"{len(told)} responses", "0 names or versions of software")


def test_control_plain_uvicorn_names_itself(tmp_path: Path, tried: Tried) -> None:
    with Service(tmp_path, command=TUTORIAL) as tutorial:
        answer = tutorial.get("/nowhere")
    assert SOFTWARE.search(str(dict(answer.headers)))
    tried("plain uvicorn's 404", f"server: {answer.headers['server']}")


# Web pages of other origins, in a browser that reaches an open service


ALLOWED_ORIGINS: list[dict[str, str]] = [
    {"Host": "localhost:8000"},
    {"Host": "localhost:8000", "Origin": "http://localhost:8000"},
    {"Host": "LOCALHOST:8000", "Origin": "http://localhost:8000"},
    {"Host": "localhost"},
    {"Host": "127.0.0.1:8000", "Origin": "http://127.0.0.1:8000"},
    {"Host": "[::1]:8000", "Origin": "http://[::1]:8000"},
    {"Host": "[::1]"},
    {"Host": "[::ffff:127.0.0.1]:8000"},
    {"Host": "192.168.7.7:8000"},
    {"Host": "api:8000"},
    {"Host": "afterward.local"},
    {"Host": "afterward.localhost:8000"},
    {"Host": "afterward.internal."},
]
FOREIGN_ORIGINS: list[dict[str, str]] = [
    {"Host": "localhost:8000", "Origin": "http://example.com"},
    {"Host": "localhost:8000", "Origin": "https://example.com"},
    {"Host": "localhost:8000", "Origin": "null"},
    {"Host": "localhost:8000", "Origin": ""},
    {"Host": "localhost:8000", "Origin": "http://localhost:8001"},
    {"Host": "localhost:8000", "Origin": "http://localhost:8000.example.com"},
    {"Host": "localhost:8000", "Origin": "http://localhost"},
    {"Host": "localhost:8000", "Origin": "http://127.0.0.1:8000"},
    {"Host": "127.0.0.1:8000", "Origin": "file://"},
    {"Host": "example.com"},
    {"Host": "example.com:8000", "Origin": "http://example.com:8000"},
    {"Host": "EXAMPLE.COM."},
    {"Host": "127.0.0.1.example.com"},
    {"Host": "localhost.example.com:8000"},
    {"Host": "local.example"},
    {"Host": "127.0.0.1.:8000"},
    {"Host": "2130706433.example.com"},
    {"Host": "xn--bcher-kva.example"},
]


@pytest.fixture(scope="module")
def open_service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    with served(tmp_path_factory.mktemp("open"), worker_concurrency=0) as client:
        yield client


@pytest.mark.parametrize("headers", ALLOWED_ORIGINS, ids=str)
def test_an_open_service_accepts_requests_to_its_own_machine_and_network(
    open_service: TestClient, headers: dict[str, str]
) -> None:
    assert open_service.get("/tasks", headers=headers).status_code == 200
    assert open_service.post("/test-task/", headers=headers).status_code == 202


@pytest.mark.parametrize("headers", FOREIGN_ORIGINS, ids=str)
def test_an_open_service_refuses_web_pages_of_other_origins(
    open_service: TestClient, headers: dict[str, str]
) -> None:
    """It refuses pages with a foreign Origin, or with a foreign host name (DNS rebinding)."""
    problem_of(open_service.get("/tasks", headers=headers), 403)
    answer = open_service.post("/send-email/?email=a@example.com", headers=headers)
    problem_of(answer, 403)
    assert "access-control-allow-origin" not in answer.headers
    assert open_service.get("/tasks").json()["data"] == []


def test_with_api_keys_a_page_needs_a_key_and_any_host_name_is_accepted(
    client: TestClient,
) -> None:
    for headers in FOREIGN_ORIGINS:
        problem_of(client.get("/tasks", headers=headers), 401)
        assert client.get("/tasks", headers=headers | ADA).status_code == 200


def test_control_the_tutorial_s_service_accepts_requests_of_any_web_page(
    tmp_path: Path, smtp_server: SmtpServer, tried: Tried
) -> None:
    with Service(tmp_path, command=TUTORIAL, smtp_port=smtp_server.port) as tutorial:
        for number, headers in enumerate(FOREIGN_ORIGINS):
            answer = tutorial.post(f"/send-notification/a{number}@example.com", headers=headers)
            assert answer.status_code == 202
        tutorial.stop()
    assert len(smtp_server.received) == len(FOREIGN_ORIGINS)
    tried("requests of web pages to the tutorial's service", f"{len(FOREIGN_ORIGINS)} mails sent")
