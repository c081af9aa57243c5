"""The access log: a line for each request, without a secret in it."""

import asyncio
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from starlette.types import Message, Scope

from app.main import create_app
from app.observability.access_log import AccessLog
from app.observability.logs import configure_logging
from tests.support.service import settings_in

pytestmark = pytest.mark.usefixtures("logging_as_before")

SCOPE: dict[str, Any] = {
    "type": "http",
    "method": "GET",
    "path": "/file",
    "client": ("192.0.2.1", 1234),
}


@pytest.fixture(autouse=True)
def the_server_s_own_lines() -> Iterator[None]:
    """Restore uvicorn's own access log after each test."""
    log = logging.getLogger("uvicorn.access")
    before = log.disabled
    yield
    log.disabled = before


def requests_in(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    """Return the lines about requests since the last call of this function."""
    lines = map(json.loads, capsys.readouterr().err.splitlines())
    return [line for line in lines if line["event"] == "request"]


def test_a_line_has_the_facts_of_the_request_and_of_its_response(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = settings_in(tmp_path, catcher=False, api_keys="ada: the-secret-key")
    with TestClient(create_app(settings)) as client:
        answer = client.post(
            "/send-notification/ada@example.com?q=secret",
            headers={"Authorization": "Bearer the-secret-key", "X-Request-ID": "my-id"},
        )
        said = capsys.readouterr().err
    (line,) = [line for line in map(json.loads, said.splitlines()) if line["event"] == "request"]
    assert line["seconds"] >= 0
    del line["seconds"], line["timestamp"]
    assert line == {
        "event": "request",
        "level": "info",
        "method": "POST",
        "path": "/send-notification/ada@example.com",
        "status": 202,
        "bytes": len(answer.content),
        "address": "testclient",
        "request_id": "my-id",
        "client": "ada",
    }
    assert "secret" not in json.dumps(line)


def test_a_refused_request_has_a_line_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with TestClient(create_app(settings_in(tmp_path, api_keys="secret"))) as client:
        client.get("/tasks")
        client.get("/nowhere", headers={"X-API-Key": "secret"})
        lines = requests_in(capsys)
    assert [(line["path"], line["status"]) for line in lines] == [
        ("/tasks", 401),
        ("/nowhere", 404),
    ]


@pytest.mark.parametrize("level", ["INFO", "DEBUG"])
@pytest.mark.parametrize("root_path", ["", "/afterward", "/live"])
def test_health_checks_are_logged_at_level_debug_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], level: str, root_path: str
) -> None:
    """A proxy may strip the prefix from the path, or pass it on."""
    settings = settings_in(tmp_path, log_level=level, root_path=root_path or None)
    probes = ["/livez", "/readyz", f"{root_path}/livez", f"{root_path}/readyz"]
    with TestClient(create_app(settings)) as client:
        for path in probes:
            assert client.get(path).is_success
        lines = requests_in(capsys)
    assert [line["path"] for line in lines] == (probes if level == "DEBUG" else [])


def test_the_access_log_can_be_switched_off(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with TestClient(create_app(settings_in(tmp_path, access_log=False))) as client:
        client.get("/tasks")
        assert requests_in(capsys) == []


@pytest.mark.parametrize("on", [True, False])
def test_the_server_logs_no_requests_itself(tmp_path: Path, *, on: bool) -> None:
    """With `uvicorn app.main:app`, its lines would have the queries, which may be secret."""
    logging.getLogger("uvicorn.access").disabled = False
    create_app(settings_in(tmp_path, access_log=on))
    assert logging.getLogger("uvicorn.access").disabled


def test_the_line_is_written_before_background_tasks_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Their own lines come after it, because they run after the response."""
    with TestClient(create_app(settings_in(tmp_path))) as client:
        client.post("/process/", json={"error": "it broke"})
        said = [json.loads(line)["event"] for line in capsys.readouterr().err.splitlines()]
    assert said.index("request") < said.index("background task failed")


async def answer(app_sends: list[Message], scope: Scope = SCOPE, root_path: str = "") -> None:
    """Serve a request with an app that sends these messages, and is then cancelled if some lack."""
    configure_logging("INFO", "json")

    async def app(_: Scope, __: object, send: Any) -> None:
        for message in app_sends:
            await send(message)
        if not app_sends or app_sends[-1].get("more_body"):
            raise asyncio.CancelledError

    async def send(_: Message) -> None:
        pass

    await AccessLog(app, root_path)(scope, send, send)  # type: ignore[arg-type]


START: Message = {"type": "http.response.start", "status": 200}


@pytest.mark.parametrize(
    ("sent", "status", "size"),
    [
        ([], None, 0),
        ([START, {"type": "http.response.body", "body": b"abc", "more_body": True}], 200, 3),
    ],
    ids=["no answer", "half an answer"],
)
@pytest.mark.anyio
async def test_a_request_whose_client_disconnects_has_a_line(
    capsys: pytest.CaptureFixture[str], sent: list[Message], status: int | None, size: int
) -> None:
    with pytest.raises(asyncio.CancelledError):
        await answer(sent)
    (line,) = requests_in(capsys)
    assert (line["status"], line["bytes"]) == (status, size)


@pytest.mark.parametrize(
    ("changes", "name", "value"),
    [
        ({"method": "HEAD"}, "bytes", 0),
        ({"client": None}, "address", None),
        ({"path": "/" + "x" * 60_000}, "path", "/" + "x" * 999),
    ],
)
@pytest.mark.anyio
async def test_an_unusual_request_has_a_line(
    capsys: pytest.CaptureFixture[str], changes: dict[str, Any], name: str, value: object
) -> None:
    await answer([START, {"type": "http.response.body", "body": b"abc"}], SCOPE | changes)
    (line,) = requests_in(capsys)
    assert line[name] == value


@pytest.mark.parametrize("root_path", ["", "/afterward"])
@pytest.mark.anyio
async def test_health_checks_are_recognised_behind_a_prefix_of_the_server(
    capsys: pytest.CaptureFixture[str], root_path: str
) -> None:
    scope = SCOPE | {"path": f"/prefix{root_path}/livez", "root_path": "/prefix"}
    await answer([START, {"type": "http.response.body"}], scope, root_path)
    assert requests_in(capsys) == []
