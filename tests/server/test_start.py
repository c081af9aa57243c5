"""The start logs all addresses, or in one line the reason why it fails. Ctrl-C ends the service."""

import json
import os
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from app import server
from app.listening import CannotListen
from app.main import _locations
from app.settings import Settings
from tests.support.service import (
    COMMAND,
    PATIENCE,
    Process,
    Service,
    free_port,
    settings_in,
    until,
)

WORKER = (*COMMAND, "worker")
CATCHER = (*COMMAND, "catcher")


def line_of(process: Process, event: str) -> dict[str, Any]:
    """Wait for the log line of an event, and return it."""

    def lines() -> list[dict[str, Any]]:
        whole = process.log.rpartition("\n")[0].splitlines()
        return [line for line in map(json.loads, whole) if line["event"] == event]

    until(lines, within=PATIENCE, what=process.log)
    return lines()[0]


# The addresses


@pytest.mark.thorough
def test_the_api_logs_the_addresses_of_its_pages_mail_and_data(tmp_path: Path) -> None:
    with Service(tmp_path) as service:
        ready, started = line_of(service, "ready"), line_of(service, "started")
        assert ready["at"] == f"{service.url}/"
        for name in ("at", "docs", "inbox"):
            assert service.get(ready[name]).is_success, name
    assert started["mail_goes_to"].startswith("the embedded catcher at 127.0.0.1:")
    assert started["queue"] == str(tmp_path / "queue.db")
    assert started["uploads"] == str(tmp_path / "uploads")


@pytest.mark.thorough
def test_the_port_that_the_system_chose_is_logged(tmp_path: Path) -> None:
    with Process(tmp_path, command=COMMAND, port=0, catcher=False) as service:
        ready = line_of(service, "ready")
        assert "inbox" not in ready
        port = int(ready["at"].removeprefix("http://127.0.0.1:").removesuffix("/"))
        socket.create_connection(("127.0.0.1", port), timeout=PATIENCE).close()


@pytest.mark.thorough
@pytest.mark.parametrize("command", [WORKER, CATCHER], ids=["worker", "catcher"])
def test_a_worker_and_a_catcher_log_their_addresses(
    tmp_path: Path, command: tuple[str, ...]
) -> None:
    port = free_port()
    with Process(tmp_path, command=command, smtp_port=port, smtp_security="tls") as process:
        if command is WORKER:
            started = line_of(process, "started")
            assert started["mail_goes_to"] == f"127.0.0.1:{port} (tls)"
        else:
            ready = line_of(process, "ready")
            assert ready["at"] == f"127.0.0.1:{port}"
            assert ready["mail_is_kept_in"] == str(tmp_path / "inbox")
        assert process.stop() == 0


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"smtp_host": "::1", "catcher": True}, "the embedded catcher at [::1]:1025"),
        ({"smtp_host": "mail.example.com"}, "mail.example.com:1025 (not encrypted)"),
        (
            {"smtp_host": "mail.example.com", "smtp_port": 587, "smtp_security": "starttls"},
            "mail.example.com:587 (starttls)",
        ),
        ({"queue_url": "sqlite:////srv/q.db"}, "/srv/q.db"),
        (
            {"queue_url": "postgresql://ada:secret@db:5433/q?password=secret"},
            "postgresql://db:5433/q",
        ),
        ({"queue_url": "postgresql:///q"}, "postgresql:///q"),
        ({"upload_url": "file:/srv/uploads"}, "/srv/uploads"),
        ({"upload_url": "s3://bucket/prefix"}, "s3://bucket/prefix"),
    ],
)
def test_logged_addresses_contain_no_passwords(settings: dict[str, Any], said: str) -> None:
    where = _locations(Settings(_env_file=None, **settings))
    assert said in where.values()
    assert "secret" not in str(where)


# The reasons why a start fails


def refusal(process: Process, *, code: int) -> str:
    """Wait for the end of a process that cannot start, and return its output."""
    assert process.wait() == code
    assert "Traceback" not in process.log
    return process.log


@pytest.mark.thorough
def test_a_second_start_in_the_same_directory_names_the_first_process(tmp_path: Path) -> None:
    with (
        Service(tmp_path) as first,
        Process(tmp_path, command=COMMAND, port=first.port) as second,
    ):
        before = second.log  # both processes write to the same file
        log = refusal(second, code=1).removeprefix(before)
        assert log == (
            f"cannot start: the service already runs here, as process {first.pid} at "
            f"{first.url}/. Stop it with: kill {first.pid}\n"
        )
        assert first.get("/livez").is_success


@pytest.mark.parametrize("host", ["192.0.2.1", "a..b"])
def test_a_wrong_host_is_reported_even_if_the_service_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, host: str
) -> None:
    monkeypatch.setattr(server, "_owner_of_the_queue", lambda _: 4711)
    with pytest.raises(CannotListen, match=f"^HOST={host} "):
        server._open_sockets(settings_in(tmp_path, host=host))


@pytest.mark.thorough
def test_a_second_start_at_another_port_fails_because_of_the_queue(tmp_path: Path) -> None:
    """The catcher's port is in use as well, but the error names only the queue."""
    port = free_port()
    with (
        Service(tmp_path, smtp_port=port) as first,
        Process(tmp_path, command=COMMAND, port=free_port(), smtp_port=port) as second,
    ):
        lines = map(json.loads, refusal(second, code=3).splitlines())
        complaint, _ = (line["event"] for line in lines if line["level"] == "error")
        assert "queue.db" in complaint
        assert str(port) not in complaint
        assert first.get("/livez").is_success


@pytest.mark.thorough
@pytest.mark.parametrize("queue", ["sqlite:///queue.db", "postgresql://nowhere.invalid/queue"])
def test_a_port_in_use_is_reported_before_anything_starts(tmp_path: Path, queue: str) -> None:
    port = free_port()
    with (
        socket.create_server(("127.0.0.1", port)),
        Process(tmp_path, command=COMMAND, port=port, queue_url=queue) as process,
    ):
        log = refusal(process, code=1)
    assert f"127.0.0.1:{port} is taken by process {os.getpid()} (" in log
    assert f" PORT={port + 1} make run" in log
    assert len(log.splitlines()) == 1
    assert not (tmp_path / "queue.db").exists()


@pytest.mark.thorough
def test_the_lock_file_of_an_ended_process_is_not_trusted(tmp_path: Path) -> None:
    with Service(tmp_path) as first:
        first.kill()
    with (
        socket.create_server(("127.0.0.1", first.port)),
        Process(tmp_path, command=COMMAND, port=first.port) as second,
    ):
        assert f"is taken by process {os.getpid()} (" in refusal(second, code=1)


@pytest.mark.thorough
@pytest.mark.parametrize("command", [COMMAND, CATCHER], ids=["serve", "catcher"])
def test_a_catcher_port_in_use_is_reported(tmp_path: Path, command: tuple[str, ...]) -> None:
    port = free_port()
    with (
        socket.create_server(("127.0.0.1", port)),
        Process(tmp_path, command=command, port=free_port(), smtp_port=port) as process,
    ):
        log = refusal(process, code=3 if command is COMMAND else 1)
    assert f"127.0.0.1:{port} is taken by process {os.getpid()} (" in log
    assert f" SMTP_PORT={port + 1} make run" in log


@pytest.mark.thorough
def test_bad_settings_are_reported_before_a_port_in_use(tmp_path: Path) -> None:
    port = free_port()
    with (
        socket.create_server(("127.0.0.1", port)),
        Process(tmp_path, command=COMMAND, port=port, api_keys="ada:") as process,
    ):
        log = refusal(process, code=2)
    assert "API_KEYS" in log
    assert str(port) not in log


def test_a_queue_on_postgresql_has_no_owning_process() -> None:
    assert server._owner_of_the_queue("postgresql://db/queue") is None


# Idle connections


def test_idle_connections_are_kept_for_keep_alive_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The default is 75 seconds, because proxies close after 60, and should close first."""
    served: list[uvicorn.Config] = []

    def keep(self: uvicorn.Server, sockets: list[socket.socket]) -> None:
        served.append(self.config)
        for opened in sockets:
            opened.close()

    monkeypatch.setattr(uvicorn.Server, "run", keep)
    for changes in ({}, {"keep_alive_seconds": 7}):
        server.serve(None, settings_in(tmp_path, port=0, **changes))
    assert [config.timeout_keep_alive for config in served] == [75, 7]


@pytest.mark.thorough
def test_an_idle_connection_is_closed_after_keep_alive_seconds(tmp_path: Path) -> None:
    with (
        Service(tmp_path, keep_alive_seconds=1) as service,
        socket.create_connection(("127.0.0.1", service.port), timeout=PATIENCE) as connection,
    ):
        connection.sendall(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n")
        heard = b""
        while block := connection.recv(1 << 16):
            heard += block
        assert heard.endswith(b"ok\n")


# Ctrl-C


@pytest.fixture
def slow_stop(tmp_path: Path) -> Iterator[Service]:
    """A service with an unfinished request, which it waits for when it stops."""
    with (
        Service(tmp_path, shutdown_grace_seconds=PATIENCE) as service,
        socket.create_connection(("127.0.0.1", service.port), timeout=PATIENCE) as client,
    ):
        head = b"POST /upload HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n"
        client.sendall(head + b"Content-Type: multipart/form-data; boundary=b\r\n\r\n")
        yield service


@pytest.mark.thorough
@pytest.mark.parametrize("command", [COMMAND, WORKER, CATCHER], ids=["serve", "worker", "catcher"])
def test_ctrl_c_ends_the_process_without_a_traceback(
    tmp_path: Path, command: tuple[str, ...]
) -> None:
    with Process(tmp_path, command=command, port=free_port()) as process:
        line_of(process, "started" if command is WORKER else "ready")
        os.kill(process.pid, signal.SIGINT)
        assert process.wait() == 0
    assert "Traceback" not in process.log


@pytest.mark.thorough
def test_a_second_ctrl_c_ends_the_process_at_once(slow_stop: Service) -> None:
    os.kill(slow_stop.pid, signal.SIGINT)
    line_of(slow_stop, "Waiting for connections to close. (CTRL+C to force quit)")
    os.kill(slow_stop.pid, signal.SIGINT)
    assert slow_stop.wait() == -signal.SIGINT
    assert "Traceback" not in slow_stop.log


def test_ctrl_c_during_the_imports_prints_no_traceback(tmp_path: Path) -> None:
    """A fake structlog module, imported first, raises SIGINT."""
    (tmp_path / "structlog.py").write_text("import signal\nsignal.raise_signal(signal.SIGINT)\n")
    with Process(tmp_path, command=COMMAND) as process:
        assert process.wait() == -signal.SIGINT
    assert process.log == ""


@pytest.mark.thorough
def test_uvicorn_can_start_the_app_directly(tmp_path: Path) -> None:
    """`uvicorn app.main:app` logs each request once."""
    command = (sys.executable, "-m", "uvicorn", "app.main:app", "--port", "{port}")
    with Service(tmp_path, command=command) as service:
        assert service.get("/livez").is_success
        assert '"event":"started"' in service.log
        assert '"GET /tasks' not in service.log
        service.get("/tasks?limit=1")
        until(lambda: service.log.count("/tasks") == 1, within=PATIENCE, what=service.log)
        service.stop()
    assert service.log.count("/tasks") == 1  # no second line from uvicorn's own access log
