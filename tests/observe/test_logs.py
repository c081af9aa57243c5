"""Log lines: which there are, and what stands on them."""

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import structlog
from fastapi.testclient import TestClient

from app.main import create_app
from app.observe.logs import configure_logging
from app.queue import worker
from tests.support.service import Service, mails_in, settings_in, wait_for

pytestmark = pytest.mark.usefixtures("logging_as_before")

each_form = pytest.mark.parametrize("form", ["json", "console"])


@pytest.fixture(autouse=True)
def retry_quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker looks often for what is due."""
    monkeypatch.setattr(worker, "POLL_SECONDS", 0.01)


@each_form
@pytest.mark.parametrize(
    ("level", "seen"),
    [
        ("DEBUG", ["debug", "info", "warning", "error"]),
        ("INFO", ["info", "warning", "error"]),
        ("WARNING", ["warning", "error"]),
        ("ERROR", ["error"]),
    ],
)
def test_the_level_bounds_our_lines_and_those_of_libraries(
    capsys: pytest.CaptureFixture[str], form: str, level: str, seen: list[str]
) -> None:
    configure_logging(level, form)
    for log in (structlog.get_logger("app.test"), logging.getLogger("library")):
        for name in ("debug", "info", "warning", "error"):
            getattr(log, name)(f"an event of level {name}")
        lines = capsys.readouterr().err.splitlines()
        assert [re.findall(r"of level (\w+)", line)[0] for line in lines] == seen


# The lines of a request and its tasks.


def lines_of(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().err.splitlines()]


def test_the_lines_of_a_task_carry_its_id_and_that_of_its_request(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with TestClient(create_app(settings_in(tmp_path))) as client:
        tasks = {}
        for request_id in ("first", "second"):
            headers = {"X-Request-ID": request_id}
            queued = client.post("/send-notification/ada@example.com", headers=headers).json()
            tasks[queued["id"]] = request_id
        for task_id in tasks:
            wait_for(client, task_id)
    lines = lines_of(capsys)
    for event in ("mail handed over", "task succeeded"):
        found = {line["task_id"]: line["request_id"] for line in lines if line["event"] == event}
        assert found == tasks
    assert len(mails_in(tmp_path)) == 2


def test_a_task_that_another_task_queued_belongs_to_the_same_request(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with TestClient(create_app(settings_in(tmp_path))) as client:
        half_a_picture = {"file": ("a.png", b"\x89PNG\r\n\x1a\n", "image/png")}
        headers = {"X-Request-ID": "7f3a"}
        queued = client.post("/upload", files=half_a_picture, headers=headers).json()
        wait_for(client, queued["id"])
        (follow_up,) = client.get("/tasks?kind=make_thumbnail").json()["data"]
        wait_for(client, follow_up["id"], "failed")
    (line,) = (
        line
        for line in lines_of(capsys)
        if line.get("task_id") == follow_up["id"] and line["level"] == "error"
    )
    assert line["request_id"] == "7f3a"


def test_an_attempt_that_fails_is_one_line_with_its_error_and_its_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = settings_in(tmp_path, catcher=False, smtp_port=1, retry_attempts=2)
    with TestClient(create_app(settings)) as client:
        queued = client.post("/send-notification/ada@example.com").json()
        wait_for(client, queued["id"], "failed")
    lines = [line for line in lines_of(capsys) if line["event"].startswith("task ")]
    assert [(line["event"], line["level"], line["attempt"]) for line in lines] == [
        ("task retrying", "warning", 1),
        ("task failed", "error", 2),
    ]
    for line in lines:
        assert line["task_id"] == queued["id"]
        assert line["kind"] == "send_email"
        assert line["error"]["type"] == "TemporaryError"
        assert "Traceback" in line["exception"]
    assert lines[0]["next_attempt_in"] >= 0


# The lines of the server.


@pytest.mark.parametrize(
    ("form", "shape"),
    [
        ("json", r'\{.*"level":"info","timestamp":"[^"]+Z".*\}'),
        ("console", r"\d{4}-\d\d-\d\dT\S+Z \[info +\] \S.*"),
    ],
)
def test_the_lines_of_the_server_look_like_ours(tmp_path: Path, form: str, shape: str) -> None:
    with Service(tmp_path, log_format=form) as service:
        queued = service.post("/send-notification/ada@example.com").json()
        service.wait_for(queued["id"])
        service.stop()
    lines = service.log.splitlines()
    assert "Uvicorn running on" in service.log
    assert "mail handed over" in service.log
    assert all(re.fullmatch(shape, line) for line in lines)
    assert "color_message" not in service.log
    assert "\x1b" not in service.log
    assert "\\u001b" not in service.log
