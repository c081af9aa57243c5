"""`python -m app tasks` as a process: against a real service, with Ctrl-C, and in a pipe."""

import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.support.service import COMMAND, PATIENCE, Process, Service, environment, until

TASKS = (*COMMAND, "tasks")


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service with an API key and a prefix. It has sent three mails, and failed to send three."""
    directory = tmp_path_factory.mktemp("service")
    with Service(directory, api_keys="the-key", root_path="/mail") as service:
        service.client.headers["Authorization"] = "Bearer the-key"
        recipients = ["ada@example.com", "refuse+550@example.com"] * 3
        batch = service.post("/mail/send-notifications", json={"recipients": recipients}).json()
        for task in batch["tasks"]:
            service.wait_for(task["id"], "failed" if "refuse" in task["email"] else "succeeded")
        yield service


def of_the_client(service: Service) -> dict[str, Any]:
    """Return the settings with which a command finds the service, and its API key."""
    return {"port": service.port, "root_path": "/mail", "afterward_api_key": "the-key"}


def tasks(service: Service, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command."""
    return subprocess.run(
        [*TASKS, *arguments],
        cwd=service.directory,
        env=environment(**of_the_client(service)),
        check=False,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )


@pytest.mark.thorough
def test_tasks_are_listed_shown_and_watched(service: Service) -> None:
    listed = tasks(service, "list", "--about", "ada@example.com", "--limit", "2")
    assert listed.returncode == 0
    rows = [line.split("\t") for line in listed.stdout.splitlines()]
    assert [row[1:4] for row in rows] == [["succeeded", "send_email", "ada@example.com"]] * 2

    shown = tasks(service, "show", rows[0][0], "--json")
    assert json.loads(shown.stdout) == service.get(f"/mail/tasks/{rows[0][0]}").json()

    watched = tasks(service, "watch", rows[0][0])
    assert watched.returncode == 0
    assert watched.stdout.split("\t")[1] == "succeeded"

    retried = tasks(service, "retry", rows[0][0])
    assert retried.returncode == 1
    assert retried.stderr.startswith("The service answered 409: ")


@pytest.mark.thorough
def test_all_failed_tasks_are_retried(service: Service) -> None:
    about = ("--about", "refuse+550@example.com")
    retried = tasks(service, "retry", "--status", "failed", *about, "--yes")
    assert (retried.stdout, retried.stderr, retried.returncode) == ("3 tasks retried\n", "", 0)

    cancelled = tasks(service, "cancel", "--about", "nobody@example.com", "--yes")
    assert (cancelled.stdout, cancelled.returncode) == ("", 1)
    assert cancelled.stderr == "No task matches that can be cancelled.\n"


@pytest.mark.thorough
def test_a_closed_pipe_ends_the_command_without_a_traceback(
    service: Service, tmp_path: Path
) -> None:
    pipe = f"{' '.join(TASKS)} watch | head -n 1"
    command = ("bash", "-o", "pipefail", "-c", pipe)
    with Process(tmp_path, command=command, **of_the_client(service)) as process:
        until(lambda: _send_mail(service) and process.ended, within=PATIENCE)
        assert process.wait() == 141
        (line,) = process.log.splitlines()
    assert "ada@example.com" in line


@pytest.mark.parametrize(
    ("redirection", "ended"),
    [
        (">/dev/full", (2, "The command cannot go on: [Errno 28] No space left on device\n")),
        (">&-", (0, "")),
        pytest.param("--about nobody 2>/dev/full", (1, ""), marks=pytest.mark.thorough),
        pytest.param("--limit 1 2>/dev/full", (2, ""), marks=pytest.mark.thorough),
        pytest.param("--limit 1 >&- 2>/dev/full", (2, ""), marks=pytest.mark.thorough),
    ],
)
def test_output_that_cannot_be_written_is_no_traceback(
    service: Service, redirection: str, ended: tuple[int, str]
) -> None:
    done = subprocess.run(
        ["sh", "-c", f'"$@" {redirection}', "sh", *TASKS, "list"],
        cwd=service.directory,
        env=environment(**of_the_client(service)),
        check=False,
        stderr=subprocess.PIPE,
        text=True,
        timeout=PATIENCE,
    )
    assert (done.returncode, done.stderr) == ended


@pytest.mark.thorough
def test_ctrl_c_ends_the_command_without_a_traceback(service: Service, tmp_path: Path) -> None:
    with Process(tmp_path, command=(*TASKS, "watch"), **of_the_client(service)) as process:
        until(lambda: _send_mail(service) and process.log, within=PATIENCE)
        os.kill(process.pid, signal.SIGINT)
        assert process.wait() == 130
        assert all("ada@example.com" in line for line in process.log.splitlines())


def _send_mail(service: Service) -> bool:
    """Cause changes of a task, which `watch` then prints."""
    return service.post("/mail/send-notification/ada@example.com").is_success


@pytest.mark.thorough
def test_the_command_goes_on_after_a_restart_of_the_service(tmp_path: Path) -> None:
    watch = (*TASKS, "watch")
    with (
        Service(tmp_path / "data") as service,
        Process(tmp_path, command=watch, port=service.port) as watching,
    ):
        send = partial(service.post, "/send-notification/ada@example.com")
        until(lambda: send() and watching.log, within=PATIENCE)
        service.kill()
        service.start()
        until(lambda: "Connected again." in watching.log, within=PATIENCE)
        task_id = send().json()["id"]
        until(lambda: f"{task_id}\tsucceeded" in watching.log, within=PATIENCE)


@pytest.mark.thorough
def test_on_a_terminal_the_command_prints_a_table(service: Service) -> None:
    """This is a real pseudo-terminal."""
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [*TASKS, "list", "--limit", "1"],
        cwd=service.directory,
        env=environment(**of_the_client(service)) | {"TERM": "xterm", "COLUMNS": "100"},
        stdout=theirs,
        stderr=theirs,
    ) as process:
        os.close(theirs)
        said = _read_all(ours)
    assert process.returncode == 0
    assert "ABOUT" in said
    assert "\x1b[32msucceeded" in said


def _read_all(terminal: int) -> str:
    """Read from a pseudo-terminal until its other side is closed, which Linux reports as EIO."""
    read = b""
    while True:
        try:
            some = os.read(terminal, 65536)
        except OSError:
            some = b""
        if not some:
            os.close(terminal)
            return read.decode()
        read += some


# The other commands


def test_the_help_names_every_command() -> None:
    said = subprocess.run(
        [*COMMAND, "--help"], env=environment(), check=True, capture_output=True, text=True
    ).stdout
    for command in ("serve", "worker", "catcher", "migrate", "tasks"):
        assert f"\n    {command} " in said


@pytest.mark.thorough
def test_the_service_does_not_import_the_terminal() -> None:
    """Otherwise each start would take longer."""
    code = "import sys, app.__main__, app.main, app.server; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], env=environment(), check=True, capture_output=True, text=True
    ).stdout.split()
    assert "app.main" in loaded
    assert not [name for name in loaded if name.startswith(("app.terminal", "httpx2"))]
