"""The log lines of the service and its server: their events, levels and fields."""

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import structlog
from fastapi.testclient import TestClient
from structlog.testing import capture_logs

from afterward import worker
from afterward.call import error_as_json
from afterward.errors import PermanentError, ServiceUnavailable, TemporaryError
from afterward.events import Event, EventType
from afterward.task import Status
from afterward.task_log import TaskLog
from app.main import create_app
from app.observability.logs import configure_logging
from tests.library.support import a_task
from tests.support.service import (
    PATIENCE,
    Service,
    free_port,
    mails_in,
    settings_in,
    until,
    wait_for,
)
from tests.support.smtp_server import SmtpServer

pytestmark = pytest.mark.usefixtures("logging_as_before")

each_form = pytest.mark.parametrize("form", ["json", "console"])


@pytest.fixture(autouse=True)
def retry_quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let workers poll every 10 ms, so that retries come quickly."""
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
def test_the_level_applies_to_the_services_lines_and_to_those_of_libraries(
    capsys: pytest.CaptureFixture[str], form: str, level: str, seen: list[str]
) -> None:
    configure_logging(level, form)
    for log in (structlog.get_logger("app.test"), logging.getLogger("library")):
        for name in ("debug", "info", "warning", "error"):
            getattr(log, name)(f"an event of level {name}")
        lines = capsys.readouterr().err.splitlines()
        assert [re.findall(r"of level (\w+)", line)[0] for line in lines] == seen


# The lines of a request and its tasks


def lines_of(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().err.splitlines()]


def test_the_lines_of_a_task_have_the_ids_of_the_task_and_its_request(
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


def test_a_follow_up_task_has_the_request_id_of_the_first_task(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with TestClient(create_app(settings_in(tmp_path))) as client:
        truncated_picture = {"file": ("a.png", b"\x89PNG\r\n\x1a\n", "image/png")}
        headers = {"X-Request-ID": "7f3a"}
        queued = client.post("/upload", files=truncated_picture, headers=headers).json()
        wait_for(client, queued["id"])
        (follow_up,) = client.get("/tasks?kind=make_thumbnail").json()["data"]
        wait_for(client, follow_up["id"], "failed")
    (line,) = (
        line
        for line in lines_of(capsys)
        if line.get("task_id") == follow_up["id"] and line["level"] == "error"
    )
    assert line["request_id"] == "7f3a"


def test_a_refused_mail_writes_one_line_without_a_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], smtp_server: SmtpServer
) -> None:
    smtp_server.always["rcpt"] = "550 5.1.1 No such user"
    settings = settings_in(tmp_path, catcher=False, smtp_port=smtp_server.port)
    with TestClient(create_app(settings)) as client:
        queued = client.post("/send-notification/ada@example.com").json()
        wait_for(client, queued["id"], "failed")
    (line,) = (line for line in lines_of(capsys) if line.get("task_id") == queued["id"])
    assert (line["event"], line["level"], line["attempt"]) == ("task failed", "error", 1)
    assert line["error"] == {
        "type": "PermanentError",
        "detail": "550 5.1.1 No such user",
        "smtp_code": 550,
    }
    assert "exception" not in line


def test_an_outage_writes_one_line_at_its_beginning_however_many_mails_wait(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = settings_in(tmp_path, catcher=False, smtp_port=free_port())
    with TestClient(create_app(settings)) as client:
        for _ in range(20):
            client.post("/send-notification/ada@example.com")
        until(lambda: client.get("/tasks?status=retrying").json()["data"], within=PATIENCE)
    tasks = [line for line in lines_of(capsys) if "kind" in line]
    assert [(line["event"], line["level"]) for line in tasks] == [
        ("a service is away, its tasks wait", "warning")
    ]
    assert tasks[0]["task_id"]
    assert "No connection to the SMTP server" in tasks[0]["error"]


# The lines of TaskLog for single events


class TaskLogLines:
    """A TaskLog with a clock that the test sets. It collects the lines that the log writes."""

    def __init__(self) -> None:
        self.now = 0.0
        self._task_log = TaskLog(lambda: self.now)

    def fail(
        self,
        error: BaseException,
        what: EventType = EventType.RETRYING,
        *,
        kind: str = "send_email",
    ) -> list[Any]:
        """Write the event of a failed attempt, and return the lines above DEBUG."""
        task = a_task(
            kind=kind,
            status=Status.RETRYING if what is EventType.RETRYING else Status.FAILED,
            attempts=1,
            error=error_as_json(error),
        )
        with capture_logs() as lines:
            self._task_log.write(Event(what, task, 0.1, error))
        return [line for line in lines if line["log_level"] != "debug"]


@pytest.fixture
def task_log() -> TaskLogLines:
    configure_logging("DEBUG", "json")
    return TaskLogLines()


def greylisted(recipient: str = "ada@example.com") -> TemporaryError:
    return TemporaryError(f"451 4.7.1 <{recipient}>: Greylisted", smtp_code=451)


def test_after_the_first_deferral_further_ones_of_a_minute_are_summed_up_in_one_line(
    task_log: TaskLogLines,
) -> None:
    """The replies differ in the recipient's address, but count as the same cause."""
    (first,) = task_log.fail(greylisted())
    assert (first["event"], first["log_level"]) == ("task retrying", "warning")
    assert first["task_id"]
    assert "exc_info" not in first
    for second in range(1, 60):
        task_log.now = second
        assert task_log.fail(greylisted(f"u{second}@example.com")) == []
    task_log.now = 60
    (summary,) = task_log.fail(greylisted())
    assert (summary["event"], summary["kind"]) == ("tasks deferred", "send_email")
    assert (summary["count"], summary["seconds"]) == (59, 60)
    assert "u59@example.com" in summary["error"]["detail"]


def test_each_cause_and_each_kind_has_its_own_line(task_log: TaskLogLines) -> None:
    assert task_log.fail(greylisted())
    assert task_log.fail(TemporaryError("450 4.2.0 Busy", smtp_code=450))
    assert task_log.fail(greylisted(), kind="another")
    assert not task_log.fail(greylisted(), kind="another")


def test_a_cause_that_returns_after_a_quiet_minute_writes_a_line_at_once(
    task_log: TaskLogLines,
) -> None:
    task_log.fail(greylisted())
    task_log.now = 61
    (line,) = task_log.fail(greylisted())
    assert line["event"] == "task retrying"


def test_a_summary_is_written_with_the_next_event_of_any_task(task_log: TaskLogLines) -> None:
    task_log.fail(greylisted())
    task_log.fail(greylisted())
    task_log.now = 61
    summary, failed = task_log.fail(PermanentError("no"), EventType.FAILED, kind="another")
    assert (summary["event"], failed["event"]) == ("tasks deferred", "task failed")


@pytest.mark.parametrize("what", [EventType.RETRYING, EventType.FAILED])
def test_only_an_unexpected_error_has_a_traceback(task_log: TaskLogLines, what: EventType) -> None:
    """Each unexpected error writes its own line."""
    for _ in range(2):
        (line,) = task_log.fail(bug := OSError("a bug"), what)
        assert line["exc_info"] is bug
    for error in (greylisted(), PermanentError("no"), ServiceUnavailable("away")):
        for line in task_log.fail(error, what):
            assert "exc_info" not in line


# The lines of the server


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("form", "shape"),
    [
        ("json", r'\{.*"level":"info","timestamp":"[^"]+Z".*\}'),
        ("console", r"\d{4}-\d\d-\d\dT\S+Z \[info +\] \S.*"),
    ],
)
def test_the_lines_of_uvicorn_have_the_services_format(
    tmp_path: Path, form: str, shape: str
) -> None:
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
