"""A 202 is a promise on disk: if the commit fails, the response is an error and never a 202."""

import errno
import json
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import pytest
from fastapi import APIRouter, BackgroundTasks, Depends, FastAPI
from fastapi.testclient import TestClient
from starlette.exceptions import HTTPException

from afterward.errors import DiskFull, QueueUnavailable
from afterward.fastapi import DurableTasks
from app.api.dependencies import LogFileDep
from app.api.routes import notifications
from app.main import create_app
from app.tasks.courtesies import write_log
from app.tasks.mail import send_email
from tests.api.requests import PROMISES, Call, problem_of, upload_of
from tests.support.service import files_below, settings_in

# Why the commit comes before the response.


def tiny_app(scope: Literal["function", "request"] | None) -> TestClient:
    """Make a service whose commit, after the route function has returned, always fails."""

    async def transaction() -> AsyncIterator[None]:
        yield
        raise OSError(errno.ENOSPC, "the disk is full")

    app = FastAPI()

    @app.post("/promise", dependencies=[Depends(transaction, scope=scope)])
    async def promise() -> str:
        return "promised"

    return TestClient(app, raise_server_exceptions=False)


def test_with_the_default_scope_a_failing_commit_still_answers_200() -> None:
    """FastAPI ends a dependency with yield after the response was sent."""
    response = tiny_app(scope=None).post("/promise")
    assert (response.status_code, response.json()) == (200, "promised")


def test_with_function_scope_a_failing_commit_is_an_error() -> None:
    """FastAPI ends this dependency before the response. DurableRoute commits at the same point."""
    assert tiny_app(scope="function").post("/promise").status_code == 500


# A database or a disk that refuses.


@contextmanager
def refusing(client: TestClient, method: str, error: Exception) -> Iterator[None]:
    """Let a method of the engine raise `error`."""

    async def refuse(*_: object, **__: object) -> None:
        raise error

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(client.app_state["queue"].engine, method, refuse)
        yield


def assert_no_trace_is_left(client: TestClient, directory: Path) -> None:
    assert client.get("/tasks").json()["data"] == []
    assert client.get("/uploads").json()["data"] == []
    assert files_below(directory / "uploads") == []
    assert not (directory / "log.txt").exists()


@pytest.mark.parametrize(("error", "status"), [(QueueUnavailable(), 503), (DiskFull(), 507)])
@pytest.mark.parametrize("key", [{}, {"Idempotency-Key": "7f3a"}], ids=["no key", "key"])
@pytest.mark.parametrize("call", PROMISES, ids=lambda call: call.path)
def test_a_failed_commit_is_never_answered_202(
    client: TestClient,
    tmp_path: Path,
    call: Call,
    key: dict[str, str],
    error: Exception,
    status: int,
) -> None:
    with refusing(client, "put", error):
        response = call.send(client, **key)
    problem_of(response, status)
    assert int(response.headers["retry-after"]) > 0
    assert "location" not in response.headers
    assert_no_trace_is_left(client, tmp_path)
    assert call.send(client, **key).status_code == 202


@pytest.mark.parametrize(("error", "status"), [(QueueUnavailable(), 503), (DiskFull(), 507)])
@pytest.mark.parametrize(("action", "kept"), [("cancel", "queued"), ("retry", "cancelled")])
def test_a_cancellation_or_retry_that_cannot_be_written_is_refused(
    idle_client: TestClient, action: str, kept: str, error: Exception, status: int
) -> None:
    client = idle_client
    path = client.post("/send-notification/ada@example.com").headers["location"]
    if action == "retry":
        client.post(f"{path}/cancel")
    with refusing(client, action, error):
        problem_of(client.post(f"{path}/{action}"), status)
    assert client.get(path).json()["status"] == kept


@pytest.mark.parametrize(
    ("path", "method"),
    [
        ("/tasks", "list_tasks"),
        ("/tasks/x", "get"),
        ("/tasks/x/events", "get"),
        ("/uploads", "list_records"),
        ("/uploads/x", "read_record"),
        ("/uploads/x/content", "read_record"),
        ("/save-data/ada", "read_record"),
        ("/batches/x", "count_batch"),
        ("/metrics", "backlog"),
    ],
)
def test_a_failed_read_is_answered_503(client: TestClient, path: str, method: str) -> None:
    with refusing(client, method, QueueUnavailable()):
        problem_of(client.get(path), 503)


@pytest.mark.parametrize(
    ("error", "status"), [(errno.ENOSPC, 507), (errno.EDQUOT, 507), (errno.EIO, 503)]
)
def test_an_upload_whose_file_cannot_be_synced_is_refused_and_removed(
    client: TestClient, tmp_path: Path, error: int, status: int
) -> None:
    def refuse(_: int) -> None:
        raise OSError(error, os.strerror(error))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", refuse)
        response = upload_of().send(client)
    problem_of(response, status)
    assert int(response.headers["retry-after"]) > 0
    assert_no_trace_is_left(client, tmp_path)
    assert upload_of().send(client).status_code == 202


# A route that fails after it has added a promise and a courtesy.


def broken_client(directory: Path, error: Exception) -> TestClient:
    router = APIRouter(route_class=notifications.router.route_class)

    @router.post("/broken")
    async def broken(
        background_tasks: BackgroundTasks, durable_tasks: DurableTasks, log_file: LogFileDep
    ) -> None:
        background_tasks.add_task(write_log, log_file, "courtesy")
        durable_tasks.add_task(
            send_email, recipient="ada@example.com", subject="Hello", message="Hello"
        )
        raise error

    app = create_app(settings_in(directory))
    app.include_router(router)
    return TestClient(app)


@pytest.mark.parametrize(
    ("error", "status"), [(RuntimeError("do-not-repeat-me"), 500), (HTTPException(418), 418)]
)
def test_a_route_that_raises_queues_no_task(tmp_path: Path, error: Exception, status: int) -> None:
    with broken_client(tmp_path, error) as client:
        problem = problem_of(client.post("/broken"), status)
        assert_no_trace_is_left(client, tmp_path)
    assert "do-not-repeat-me" not in json.dumps(problem)


def test_an_unexpected_error_is_logged_once_with_its_traceback_and_request_id(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with broken_client(tmp_path, RuntimeError("the reason")) as client:
        client.post("/broken", headers={"X-Request-ID": "7f3a"})
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    (error,) = [line for line in lines if line["level"] == "error"]
    assert error["request_id"] == "7f3a"
    assert error["path"] == "/broken"
    assert error["exception"].endswith("RuntimeError: the reason")
