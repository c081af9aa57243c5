"""The service for tests: `settings_in` for one in this process, `Service` for a real server."""

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

from app.mail.catcher import Catcher
from app.mail.caught import Caught
from app.settings import Settings

ROOT = Path(__file__).parents[2]
COMMAND = (sys.executable, "-m", "app")
PATIENCE = 30.0  # seconds, for what ought to take a moment, on a machine that may be busy

logging.getLogger("httpx2").setLevel(logging.WARNING)  # a line for each request helps nobody

Json = dict[str, Any]


def settings_in(directory: Path, **changes: object) -> Settings:
    """Settings that keep everything below `directory`; mail goes to the embedded catcher."""
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


_given_lately: deque[int] = deque(maxlen=100)


def free_port() -> int:
    """A TCP port on loopback that nobody listens at.

    It is not one of those that the system gives to clients, nor of the tests that run beside.
    """
    first = 20_000 + 1_000 * int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:])
    while True:
        port = random.randrange(first, first + 1_000)
        if port in _given_lately:  # to somebody who may not have begun to listen
            continue
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.bind(("127.0.0.1", port))
            _given_lately.append(port)
            return port


def wait_for(
    client: httpx2.Client, task_id: str, status: str = "succeeded", *, at_most: float = PATIENCE
) -> Json:
    """Wait until a task has this status; returns the task."""
    deadline = time.monotonic() + at_most
    while True:
        task: Json = client.get(f"/tasks/{task_id}").raise_for_status().json()
        if task["status"] == status:
            return task
        assert time.monotonic() < deadline, f"the task is not {status}: {task}"
        time.sleep(0.01)


def until(true: Callable[[], object], *, within: float, what: object = "") -> float:
    """Wait until something is true; gives how many seconds that took."""
    began = time.monotonic()
    while not true():
        assert time.monotonic() < began + within, f"not within {within} s {what}"
        time.sleep(0.02)
    return time.monotonic() - began


def wait_until_open(port: int) -> None:
    """Wait until somebody listens at this port of loopback."""

    def is_open() -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return True
        return False

    until(is_open, within=PATIENCE, what=f"at port {port}")


def mails_in(directory: Path) -> list[Caught]:
    """What the catcher of the service in `directory` has caught, newest first."""
    catcher = Catcher("", 0, directory / "inbox")
    return [caught for mail in catcher.list() if (caught := catcher.get(mail.id))]


def files_below(directory: Path) -> list[str]:
    """The files, and nothing but the files, at any depth."""
    return sorted(
        str(path.relative_to(directory)) for path in directory.rglob("*") if not path.is_dir()
    )


class Process:
    """A command as a process of its own, for example `python -m app worker`.

    It works in `directory`. Settings are named as in `Settings`; what it writes is in `log`.
    """

    def __init__(self, directory: Path, *, command: Sequence[str], **settings: object) -> None:
        self.directory = directory
        self._command = command
        self._settings = _defaults(directory) | settings
        self._log = directory / "service.log"
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        """Start it."""
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        """End it at once, if it still runs."""
        self.kill()

    def start(self) -> None:
        """Start it, again perhaps."""
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
        """Its number, also after its end."""
        assert self._process is not None
        return self._process.pid

    @property
    def ended(self) -> bool:
        """Whether it runs no more."""
        assert self._process is not None
        return self._process.poll() is not None

    def wait(self, at_most: float = PATIENCE) -> int:
        """Wait for its end; returns the exit code."""
        assert self._process is not None
        return self._process.wait(at_most)

    def stop(self, *, within: float = PATIENCE) -> int:
        """Send SIGTERM and wait for the end; returns the exit code."""
        assert self._process is not None
        self._process.terminate()
        return self.wait(within)

    def kill(self) -> None:
        """Send SIGKILL, if it still runs."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(PATIENCE)

    @property
    def log(self) -> str:
        """All that was written to standard output and standard error so far."""
        return self._log.read_text()


class Service(Process):
    """`python -m app` as a process of its own, on a free port, with all its data in `directory`.

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
        """Start, and wait until it answers."""
        self.client = httpx2.Client(base_url=self.url, timeout=PATIENCE)
        try:
            self.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """End it at once, if it still runs."""
        super().__exit__()
        self.client.close()

    def start(self) -> None:
        """Start it, again perhaps, on the same data and port; wait until it answers."""
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
        """Wait until a task has this status; returns the task."""
        return wait_for(self.client, task_id, status, at_most=at_most)

    @property
    def mails(self) -> list[Caught]:
        """What the embedded catcher has caught, newest first."""
        return mails_in(self.directory)


def environment(**settings: object) -> dict[str, str]:
    """The environment variables of a process of the service; nothing of ours leaks into it."""
    return {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(ROOT),
        "PYTHONWARNINGS": "error",
        **{name.upper(): str(value) for name, value in settings.items()},
    }
