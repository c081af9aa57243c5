"""The README tells the truth: its tour runs, command by command, and its tables are complete."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from app.settings import Settings
from tests.support.service import PATIENCE, ROOT, free_port

README = (ROOT / "README.md").read_text()


def commands(stop: str) -> str:
    """The commands of one stop of the tour, as they stand in the README."""
    match = re.search(rf"<!-- tour: {stop} -->\n```sh\n(.*?)```", README, re.DOTALL)
    assert match is not None, f"the README has no stop named {stop}"
    return match[1]


class Terminal:
    """Runs the README's commands in a clone, with ports that are free here."""

    def __init__(self, clone: Path) -> None:
        self.clone = clone
        self.port = free_port()
        self.environment = {
            "PATH": os.environ["PATH"],
            "PORT": str(self.port),
            "SMTP_PORT": str(free_port()),
            "RETRY_MAX_SECONDS": "0.2",
            "RETRY_ATTEMPTS": "1000",
        }
        self.service: subprocess.Popen[bytes] | None = None

    def run(self, stop: str) -> str:
        """Run the commands of a stop; gives what they printed."""
        text = commands(stop).replace("localhost:8000", f"localhost:{self.port}")
        return subprocess.run(
            ["bash", "-euc", text],
            cwd=self.clone,
            env=self.environment,
            check=True,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        ).stdout

    def run_until(self, stop: str, seen: Callable[[str], bool]) -> str:
        """Run the commands of a stop again and again, until the right thing is seen."""
        deadline = time.monotonic() + PATIENCE
        while not seen(output := self.run(stop)):
            assert time.monotonic() < deadline, output
            time.sleep(0.05)
        return output

    def start(self, stop: str) -> None:
        """Run the commands of a stop that start the service, and wait until it answers."""
        self.service = subprocess.Popen(
            ["bash", "-euc", commands(stop)],
            cwd=self.clone,
            env=self.environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        deadline = time.monotonic() + PATIENCE
        probe = ["curl", "-fs", f"localhost:{self.port}/livez"]
        while subprocess.run(probe, capture_output=True, check=False).returncode:
            assert time.monotonic() < deadline, "the service does not answer"
            time.sleep(0.05)

    def press_ctrl_c(self) -> None:
        """Interrupt the service, as a terminal does: everything in its group."""
        if self.service is not None and self.service.poll() is None:
            os.killpg(self.service.pid, signal.SIGINT)
            self.service.wait(PATIENCE)


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Terminal]:
    """A terminal in a clone of its own, where the packages of this run count as installed."""
    for name in ("Makefile", "app", "README.md", "requirements.txt", "scripts"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / ".venv").mkdir()
    for name in ("bin", "lib", "pyvenv.cfg"):
        (tmp_path / ".venv" / name).symlink_to(Path(sys.prefix) / name)
    shutil.copy(ROOT / "requirements.txt", tmp_path / ".venv")
    terminal = Terminal(tmp_path)
    yield terminal
    terminal.press_ctrl_c()


def test_the_two_minutes_of_the_readme(terminal: Terminal) -> None:
    """A mail, a retry, a kill, a restart, an upload, a batch: each as the README says."""
    terminal.start("restart")
    answer = terminal.run("send")
    assert answer.startswith("HTTP/1.1 202 Accepted")
    terminal.run_until("status", lambda output: '"succeeded"' in output)
    terminal.press_ctrl_c()

    terminal.start("without-catcher")
    assert '"status":"retrying"' in terminal.run_until(
        "send-again", lambda output: '"retrying"' in output
    )
    terminal.run("kill")
    assert terminal.service is not None
    terminal.service.wait(PATIENCE)

    terminal.start("restart")
    terminal.run_until("watch", lambda output: '"succeeded"' in output)
    assert '"kind":"save_upload"' in terminal.run("upload")
    assert '"total":2' in terminal.run("batch")


def test_the_readme_names_every_setting() -> None:
    """In the first column of its table."""
    table = README.partition("## Settings")[2].partition("## Limits")[0]
    first_column = "".join(re.findall(r"^\|([^|]*)\|", table, re.MULTILINE))
    named = set(re.findall(r"`([A-Z_]+)`", first_column))

    assert named == {name.upper() for name in Settings.model_fields}


def test_the_files_that_the_readme_names_are_there() -> None:
    """Paths in backquotes, below app/, tests/ and docs/."""
    for path in re.findall(r"`((?:app|tests|docs)/[\w./]*)`", README):
        if path != "app/tasks/greetings.py":  # the one that the reader is to write
            assert (ROOT / path).exists(), path
