"""A task raises an error, or it cannot write to its log file.

The service writes one error line with the request's id, and for a durable task also with the task's
id. The other tasks of the request run, and the client's connection stays open.

File permissions do not bind root. So a test that runs as root starts the service without root's
capabilities.
"""

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
import pytest
from fastapi import BackgroundTasks, FastAPI
from fastapi.testclient import TestClient

from app.tasks.log_file import LOOK_AGAIN_SECONDS
from tests.support.disks import UNPRIVILEGED, read_only
from tests.support.service import COMMAND, PATIENCE, Service, until
from tests.support.smtp_server import SmtpServer, in_a_thread
from tests.support.torture import Tried, form

REQUESTS = form(5, 200)
SIBLINGS = 3


@pytest.fixture(scope="module")
def smtp() -> Iterator[SmtpServer]:
    server = SmtpServer()
    with in_a_thread(server):
        yield server


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, smtp: SmtpServer) -> Iterator[Service]:
    """A service for all tests of this module. Each test undoes its fault."""
    directory = tmp_path_factory.mktemp("service")
    with Service(
        directory,
        command=(*UNPRIVILEGED, *COMMAND),
        catcher=False,
        smtp_port=smtp.port,
        log_file=directory / "logs" / "log.txt",
    ) as service:
        yield service


def errors_of(service: Service, *request_ids: str) -> list[dict[str, Any]]:
    """Return the error lines of these requests."""
    lines = [json.loads(line) for line in service.log.splitlines()]
    return [
        line for line in lines if line["level"] == "error" and line.get("request_id") in request_ids
    ]


# A courtesy raises an error


@pytest.mark.parametrize("path", ["/multiple-tasks/", "/process/"])
def test_a_courtesy_that_raises_writes_one_error_line_with_its_traceback(
    service: Service, path: str
) -> None:
    request_id = f"raises{path}"
    answer = service.post(path, headers={"X-Request-ID": request_id}, json={"error": "on purpose"})
    assert answer.status_code == 202
    service.get("/livez")
    (error,) = errors_of(service, request_id)
    assert error["event"] == "background task failed"
    assert error["task"] == "process_data"
    assert "Traceback" in error["exception"]
    assert error["exception"].endswith("ValueError: the data asked for an error")


def test_a_courtesy_that_raises_does_not_close_the_connection(service: Service) -> None:
    """With plain BackgroundTasks, the server closes it, and the client's next request fails."""
    with httpx2.Client(base_url=service.url, timeout=PATIENCE) as client:
        ports = set()
        for _ in range(5):
            with client.stream("POST", "/process/", json={"error": 1}) as response:
                ports.add(response.extensions["network_stream"].get_extra_info("client_addr")[1])
                assert response.status_code == 202
                response.read()
    assert len(ports) == 1


# A promise fails


def test_a_failed_promise_writes_one_error_line_and_its_siblings_succeed(
    service: Service, smtp: SmtpServer, tried: Tried
) -> None:
    """The SMTP server refuses one of several mails. All share an X-Request-ID."""
    refused = list[str]()
    names = [f"promise-{number}" for number in range(REQUESTS)]
    for name in names:
        smtp.once["rcpt"].append("550 5.1.1 Nobody here")
        tasks = [mail_to(service, name) for _ in range(1 + SIBLINGS)]
        until(partial(all_ended, service, tasks), within=PATIENCE)
        (failed,) = (task for task in tasks if status_of(service, task) == "failed")
        refused.append(failed)

    errors = errors_of(service, *names)
    tried(
        f"{REQUESTS} times {1 + SIBLINGS} mails, one of them refused",
        f"{len(errors)} error lines, {REQUESTS * SIBLINGS} others sent",
    )
    assert [error["event"] for error in errors] == ["task failed"] * REQUESTS
    assert [error["task_id"] for error in errors] == refused
    assert [error["request_id"] for error in errors] == names


def all_ended(service: Service, tasks: list[str]) -> bool:
    return {status_of(service, task) for task in tasks} <= {"succeeded", "failed"}


def status_of(service: Service, task_id: str) -> str:
    return str(service.get(f"/tasks/{task_id}").json()["status"])


def mail_to(service: Service, name: str) -> str:
    """Request a mail, and with it two lines in the log file; return the task's id."""
    headers = {"X-Request-ID": name}
    answer = service.post("/send-notification/ada@example.com?q=hello", headers=headers)
    return str(answer.raise_for_status().json()["id"])


# The log file cannot be written


@pytest.mark.parametrize("trouble", ["read-only", "gone"])
def test_a_line_that_cannot_be_logged_writes_an_error_line_and_the_mail_is_sent(
    service: Service, trouble: str, tried: Tried
) -> None:
    """Each request writes two lines: the dependency's and the route's."""
    logs = service.directory / "logs"
    names = [f"{trouble}-{number}" for number in range(REQUESTS)]
    with unusable(logs, trouble):
        # The service checks only at intervals whether its log file still exists.
        until(lambda: log_fails(service, trouble), within=LOOK_AGAIN_SECONDS + PATIENCE)
        for name in names:
            service.wait_for(mail_to(service, name))
        errors = errors_of(service, *names)
    tried(
        f"the log's directory {trouble}, {REQUESTS} requests with 2 lines each",
        f"{len(errors)} error lines, {REQUESTS} mails sent",
    )
    assert Counter(error["request_id"] for error in errors) == dict.fromkeys(names, 2)
    assert {error["task"] for error in errors} == {"write_log"}

    mail_to(service, f"after-{trouble}")
    service.get("/livez")
    assert (logs / "log.txt").read_text().splitlines()[-1] == "message to ada@example.com"


@contextmanager
def unusable(directory: Path, trouble: str) -> Iterator[None]:
    """Make the directory unusable: read-only, or replaced by a file."""
    shutil.rmtree(directory, ignore_errors=True)
    if trouble == "read-only":
        directory.mkdir()
        with read_only(directory):
            yield
    else:
        directory.touch()
        yield
        directory.unlink()


def log_fails(service: Service, trouble: str) -> bool:
    service.post("/test-task/", headers={"X-Request-ID": f"look-{trouble}"})
    return bool(errors_of(service, f"look-{trouble}"))


# The negative control


def test_control_plain_background_tasks_skip_the_siblings(tmp_path: Path, tried: Tried) -> None:
    """The tutorial's write_log fails, so Starlette never runs the mail task after it."""
    app = FastAPI()
    sent = list[str]()

    def write_notification(email: str) -> None:
        with (tmp_path / "gone" / "log.txt").open("a") as log:
            log.write(f"notification for {email}")

    @app.post("/send-notification/{email}", status_code=202)
    async def send_notification(email: str, background_tasks: BackgroundTasks) -> None:
        background_tasks.add_task(write_notification, email)
        background_tasks.add_task(sent.append, email)

    client = TestClient(app, raise_server_exceptions=False)
    for _ in range(REQUESTS):
        assert client.post("/send-notification/ada@example.com").status_code == 202
    tried(f"{REQUESTS} requests with plain BackgroundTasks", f"202, {len(sent)} mails sent")
    assert not sent
