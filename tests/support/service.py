"""The service for tests: `settings_in` for an app in this process, `Service` for a real server."""

import contextlib
import logging
import os
import random
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

import httpx2

from afterward.task import FINISHED
from app.mail.catcher import Catcher
from app.mail.caught import Caught
from app.settings import Settings

ROOT = Path(__file__).parents[2]
COMMAND = (sys.executable, "-m", "app")
PATIENCE = 30.0  # seconds to wait for an event that takes a moment, even on a busy machine

logging.getLogger("httpx2").setLevel(logging.WARNING)  # not a line for each request

Json = dict[str, Any]


def settings_in(directory: Path, **changes: object) -> Settings:
    """Return settings that keep all data in `directory`. Mail goes to the embedded catcher."""
    return Settings(_env_file=None, **(_defaults(directory) | changes))


def _defaults(directory: Path) -> dict[str, Any]:
    return {
        "queue_url": f"sqlite:///{directory}/queue.db",
        "upload_url": f"file:{directory}/uploads",
        "log_file": directory / "log.txt",
        "catcher": True,
        "catcher_directory": directory / "inbox",
        "smtp_port": free_port(),
        "retry_base_seconds": 0.01,
        "log_format": "json",
    }


_recent_ports: deque[int] = deque(maxlen=100)


def free_port() -> int:
    """Return a TCP port on loopback that no process listens at.

    The port lies outside the system's ephemeral range, and outside the ranges of the other test
    processes: worker gw3, for example, uses 23,000 to 23,999.
    """
    first = 20_000 + 1_000 * int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:])
    while True:
        port = random.randrange(first, first + 1_000)
        if port in _recent_ports:  # its user may not have started to listen yet
            continue
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.bind(("127.0.0.1", port))
            _recent_ports.append(port)
            return port


def wait_for(
    client: httpx2.Client, task_id: str, status: str = "succeeded", *, at_most: float = PATIENCE
) -> Json:
    """Wait until a task has this status, and return the task.

    Raise AssertionError after `at_most` seconds, or at once if the task has another final status.
    """
    deadline = time.monotonic() + at_most
    while True:
        task: Json = client.get(f"/tasks/{task_id}").raise_for_status().json()
        if task["status"] == status:
            return task
        in_time = task["status"] not in FINISHED and time.monotonic() < deadline
        assert in_time, f"the task is not {status}: {task}"
        time.sleep(0.01)


def until(true: Callable[[], object], *, within: float, what: object = "") -> float:
    """Wait until `true()` holds, and return how many seconds that took.

    Raise AssertionError after `within` seconds. `what` is added to its message.
    """
    began = time.monotonic()
    while not true():
        assert time.monotonic() < began + within, f"not within {within} s {what}"
        time.sleep(0.02)
    return time.monotonic() - began


def wait_until_open(port: int) -> None:
    """Wait until a process listens at this port of loopback."""

    def is_open() -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return True
        return False

    until(is_open, within=PATIENCE, what=f"at port {port}")


def mails_in(directory: Path) -> list[Caught]:
    """Return the mails caught by the service with its data in `directory`, newest first."""
    catcher = Catcher("", 0, directory / "inbox")
    return [caught for mail in catcher.list() if (caught := catcher.get(mail.id))]


def files_below(directory: Path) -> list[str]:
    """Return the relative paths of all files below a directory, without the directories."""
    return sorted(
        str(path.relative_to(directory)) for path in directory.rglob("*") if not path.is_dir()
    )


class Process:
    """A command that runs as a separate process, for example `python -m app worker`.

    It runs in `directory`. Settings have the names of `Settings`; its output is in `log`.
    """

    def __init__(self, directory: Path, *, command: Sequence[str], **settings: object) -> None:
        self.directory = directory
        self._command = command
        self._settings = _defaults(directory) | settings
        self._log = directory / "service.log"
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        """Start the process."""
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Kill the process if it still runs."""
        self.kill()

    def start(self) -> None:
        """Start or restart the process."""
        self.directory.mkdir(exist_ok=True)
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command,
                cwd=self.directory,
                env=environment(**self._settings),
                stdout=log,
                stderr=log,
            )

    @property
    def pid(self) -> int:
        """The process id, also after the end of the process."""
        assert self._process is not None
        return self._process.pid

    @property
    def ended(self) -> bool:
        """Whether the process has ended."""
        assert self._process is not None
        return self._process.poll() is not None

    def wait(self, at_most: float = PATIENCE) -> int:
        """Wait for the end of the process, and return its exit code."""
        assert self._process is not None
        return self._process.wait(at_most)

    def stop(self, *, within: float = PATIENCE) -> int:
        """Send SIGTERM, wait for the end, and return the exit code."""
        assert self._process is not None
        self._process.terminate()
        return self.wait(within)

    def kill(self) -> None:
        """Send SIGKILL if the process still runs."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(PATIENCE)

    @property
    def log(self) -> str:
        """Everything written to standard output and standard error so far."""
        return self._log.read_text()


class Service(Process):
    """`python -m app` as a separate process, on a free port, with all its data in `directory`.

        with Service(tmp_path, retry_attempts=1) as service:
            task = service.post("/send-notification/ada@example.com").json()
            service.kill()
            service.start()
            service.wait_for(task["id"])

    In the command, "{port}" stands for the port.
    """

    def __init__(
        self,
        directory: Path,
        *,
        command: Sequence[str] = COMMAND,
        host: str = "127.0.0.1",
        **settings: object,
    ) -> None:
        self.port = free_port()
        self.url = f"http://{host}:{self.port}"
        command = [part.format(port=self.port) for part in command]
        super().__init__(directory, command=command, host=host, port=self.port, **settings)

    def __enter__(self) -> Self:
        """Start the service, and wait until it answers."""
        self.client = httpx2.Client(base_url=self.url, timeout=PATIENCE)
        try:
            self.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """Kill the process if it still runs."""
        super().__exit__()
        self.client.close()

    def start(self) -> None:
        """Start or restart the service on the same data and port, and wait until it answers."""
        super().start()
        assert self._process is not None
        deadline = time.monotonic() + PATIENCE
        while not self._answers():
            assert self._process.poll() is None, f"it ended:\n{self.log}"
            assert time.monotonic() < deadline, f"it does not answer:\n{self.log}"
            time.sleep(0.02)

    def _answers(self) -> bool:
        try:
            return self.get("/livez").is_success
        except httpx2.TransportError:
            return False

    def get(self, path: str, **options: Any) -> httpx2.Response:
        """Send a GET request."""
        return self.client.get(path, **options)

    def post(self, path: str, **options: Any) -> httpx2.Response:
        """Send a POST request."""
        return self.client.post(path, **options)

    def wait_for(
        self, task_id: str, status: str = "succeeded", *, at_most: float = PATIENCE
    ) -> Json:
        """Wait until a task has this status, and return the task."""
        return wait_for(self.client, task_id, status, at_most=at_most)

    @property
    def mails(self) -> list[Caught]:
        """The mails that the embedded catcher has caught, newest first."""
        return mails_in(self.directory)


def environment(**settings: object) -> dict[str, str]:
    """Return the environment of a service process. It inherits only PATH from this process."""
    return {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(ROOT),
        "PYTHONWARNINGS": "error",
        **{name.upper(): str(value) for name, value in settings.items()},
    }
