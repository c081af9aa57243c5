"""Line breaks, terminal codes and format strings in all fields that may reach a log line.

Each event is a single printable line, in console and in json form, on standard error and in
LOG_FILE. A traceback on a console has more lines, all indented, so that none looks like an event.
"""

import json
import logging
import re
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import structlog
from fastapi import BackgroundTasks, FastAPI
from fastapi.testclient import TestClient

from app.observability import logs
from app.observability.logs import configure_logging
from tests.support.forms import file_part, form_of, part, posted
from tests.support.service import PATIENCE, until
from tests.support.smtp_server import DROP
from tests.support.target import NOTIFICATION, Target, attacked
from tests.support.torture import LONG, Tried
from tests.support.wire import say

pytestmark = pytest.mark.usefixtures("logging_as_before")

FORGED = {
    "json": '{"event":"forged","level":"info","timestamp":"1999-01-01T00:00:00.000000Z"}',
    "console": "1999-01-01T00:00:00.000000Z [info     ] forged",
}
HOSTILE = {
    "CR": "\r{forged}",
    "LF": "\n{forged}",
    "CRLF": "\r\n{forged}\r\n",
    "two": "\n\n{forged}\n",
    "VT": "\v{forged}",
    "FF": "\f{forged}",
    "1C": "\x1c{forged}",
    "a colour": "\x1b[31mred",
    "a cleared screen": "\x1b[2J\x1b[H{forged}",
    "a title": "\x1b]0;title\a",
    "a C1 control": "\x9b2J",
    "U+2028": "\u2028{forged}",
    "U+2029": "\u2029{forged}",
    "U+0085": "\x85{forged}",
    "NUL": "\0",
    "backspace": "\b\b\b\b\b\b\b\b{forged}",
    "a changed direction": "\u202e",
    "half a surrogate pair": "\ud800",
    "a format": "%s %d %(x)s {x} {0} {0.__class__}",
    "quotes": "\"'\\",
    "an escaped LF": "\\n{forged}",
}
Write = Callable[[str], object]


def hostile(form: str) -> list[str]:
    return [
        "before" + text.replace("{forged}", FORGED[form]) + "after" for text in HOSTILE.values()
    ]


def log_event(**facts: Any) -> None:
    structlog.get_logger("app.test").info("it happened", **facts)


def raise_and_log(text: str) -> None:
    try:
        raise ValueError(text)
    except ValueError:
        structlog.get_logger("app.test").exception("it failed")


WRITERS: dict[str, Write] = {
    "a value": lambda text: log_event(value=text),
    "a value in a value": lambda text: log_event(error={"detail": [text]}),
    "bytes": lambda text: log_event(value=text.encode("utf-8", "surrogatepass")),
    "an exception": lambda text: log_event(error=ValueError(text)),
    "a traceback": raise_and_log,
    "the event": lambda text: structlog.get_logger("app.test").info(text),
    "a library's message": lambda text: logging.getLogger("library").info(text),
    "a library's argument": lambda text: logging.getLogger("library").info("got %s", text),
    "a library's extra": lambda text: logging.getLogger("library").info("x", extra={"y": text}),
}

each_form = pytest.mark.parametrize("form", ["json", "console"])


@each_form
@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_each_event_is_a_single_line(
    capsys: pytest.CaptureFixture[str], form: str, write: Write
) -> None:
    configure_logging("INFO", form)
    for text in hostile(form):
        write(text)
        output = capsys.readouterr().err
        (event,) = events_in(output, form)
        assert "before" in output
        assert "after" in output
        assert event


def events_in(log: str, form: str) -> list[str]:
    """Return the lines of a log that are events. All lines must be printable, and none forged."""
    assert log.endswith("\n")
    lines = log[:-1].split("\n")
    assert all(line.isprintable() for line in lines), log
    if form == "json":
        assert all(json.loads(line)["event"] != "forged" for line in lines), log
        return lines
    events = [line for line in lines if not line.startswith("  ")]
    assert all(re.match(r"20\d\d-\d\d-\d\dT\S+Z \[\w+ *\] ", line) for line in events), log
    return events


# Through every field, on a real server
STAGES = ["connect", "ehlo", "mail", "rcpt", "data", "dot"]


def requests(text: str) -> Iterator[bytes]:
    """Yield requests with this text in each field in turn."""
    raw = text.encode("utf-8", "surrogatepass")
    encoded = quote(raw, safe="")
    yield posted(f"{NOTIFICATION}?q={encoded}", b"")
    yield posted(f"/send-notification/{encoded}@example.com", b"")
    for field in ("subject", "message", text):
        body = json.dumps({field: text}, ensure_ascii=False).encode("utf-8", "surrogatepass")
        yield posted(NOTIFICATION, body, b"application/json")
    yield posted("/upload", form_of(file_part(raw)))
    yield posted("/upload", form_of(part(b'name="file"; filename="a"', b"Content-Type: " + raw)))
    for header in (b"X-Request-ID", b"Idempotency-Key", b"User-Agent", b"Origin", b"Referer"):
        line = b"\r\n%b: %b\r\nConnection" % (header, raw)
        yield posted(NOTIFICATION, b"").replace(b"\r\nConnection", line, 1)
    # A request with a foreign Origin is refused, and the log line of it contains the path.
    for path in (f"/{encoded}", f"/tasks/{encoded}", f"/uploads/{encoded}/content"):
        origin = b"\r\nOrigin: http://example.com\r\nConnection"
        yield posted(path, b"").replace(b"\r\nConnection", origin, 1)


def replies(text: str) -> list[str]:
    """Return SMTP replies with this text."""
    if "\ud800" in text:
        return []
    return [f"550 5.1.1 {text}", f"550-5.1.1 {text}\r\n550 {text}", f"250 2.0.0 {text}"]


def send_and_hear(target: Target, stage: str, reply: str) -> None:
    """Send a mail, to which the SMTP server gives this reply at this stage."""
    once = target.smtp_server.once
    once["mail"].append(DROP)  # close the connection, because only a new one gets a greeting
    once[stage].append(reply)
    location = target.post(NOTIFICATION).headers["location"]
    until(lambda: target.service.get(location).json()["finished_at"], within=PATIENCE)
    once.clear()


@each_form
def test_no_request_and_no_smtp_reply_forges_a_log_line(
    tmp_path: Path, form: str, tried: Tried
) -> None:
    with attacked(tmp_path, log_format=form, mail_retry_seconds=0) as target:
        # In the short form, each of the two log formats uses half of the texts.
        texts = hostile(form) if LONG else hostile(form)[form == "json" :: 2]
        sent = [request for text in texts for request in requests(text)]
        for request in sent:
            say(target.service.port, request)
        said = list(product(STAGES, [reply for text in texts for reply in replies(text)]))
        for stage, reply in said if LONG else said[:: len(STAGES) + 1]:
            send_and_hear(target, stage, reply)
        target.traces()
        log, log_file = target.service.log, (tmp_path / "log.txt").read_text()
    events = events_in(log, form)
    assert "before" in log
    courtesies = log_file[:-1].split("\n")
    assert all(line.isprintable() for line in courtesies)
    assert all(line.startswith(("message to ", "found query: before")) for line in courtesies)
    tried(
        f"{len(sent)} requests with {len(texts)} texts in every field, and SMTP replies, {form}",
        f"{len(events)} events and {len(courtesies)} courtesies, a line each, 0 forged",
    )


# Negative controls


def test_control_forged_lines_appear_in_the_tutorial_s_log(tmp_path: Path, tried: Tried) -> None:
    """The tutorial's `write_log`, and the standard library's logging, write the text unchanged."""
    path = tmp_path / "log.txt"
    log = logging.getLogger("tutorial")
    log.addHandler(handler := logging.FileHandler(tmp_path / "standard.txt"))
    app = FastAPI()

    def write_log(message: str) -> None:
        with path.open("a") as file:
            file.write(message + "\n")
        log.warning("%s", message)

    @app.post("/send-notification/{email}")
    async def send_notification(email: str, background_tasks: BackgroundTasks, q: str = "") -> None:
        background_tasks.add_task(write_log, f"found query: {q}")

    client = TestClient(app)
    for name in ("LF", "CRLF"):
        query = HOSTILE[name].replace("{forged}", FORGED["console"])
        client.post("/send-notification/ada@example.com", params={"q": query})
    log.removeHandler(handler)
    handler.close()
    for written in (path, tmp_path / "standard.txt"):
        lines = written.read_text().splitlines()
        forged = sum(line.startswith(FORGED["console"]) for line in lines)
        assert forged == 2
    tried("the tutorial's write_log, and logging.warning, 2 queries each", "2 lines forged in each")


def test_control_without_the_escapes_a_console_shows_forged_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tried: Tried
) -> None:
    monkeypatch.setattr(logs, "_escape_values", lambda _, __, event: event)
    configure_logging("INFO", "console")
    for text in hostile("console"):
        if text.encode("utf-8", "replace").decode() == text:
            log_event(value=text)
            raise_and_log(text)
    forged = capsys.readouterr().err.count("\n" + FORGED["console"])
    tried(f"structlog's plain console, {2 * len(HOSTILE)} events", f"{forged} lines forged")
    assert forged
