"""P11: the duration of a start until the first 202, and of the imports.

Each start has a new process and a new database. Each import is a new process too,
`python -c "import …"`, measured from its beginning to its end. All modules are compiled to bytecode
already.
"""

import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from benchmarks.harness import Failed, Result, Spread, Target, compared, in_turn
from benchmarks.load import ROOT
from tests.support.service import free_port

POLL_SECONDS = 0.001
LONGEST_SECONDS = 20.0
ENVIRONMENT = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT)}

REQUEST = (
    b"POST /send-notification/ada@example.com HTTP/1.1\r\n"
    b"Host: localhost\r\nContent-Length: 0\r\n\r\n"
)


def measure(quick: bool) -> Iterator[Result]:
    """Measure starts and imports, in turn."""
    contestants: dict[str, Callable[[], float]] = {
        "start": first_202,
        "app.main": partial(_import, "app.main"),
        "fastapi": partial(_import, "fastapi"),
    }
    in_turn(1, contestants)  # to warm up
    seconds = in_turn(7 if quick else 21, contestants)
    yield Result(
        "P11",
        "from the start of the process to the first 202",
        Spread.of(seconds["start"]),
        unit="s",
        target=Target("≤", 1),
    )
    yield compared(
        "P11",
        "import app.main, against import fastapi",
        seconds["app.main"],
        seconds["fastapi"],
        target=Target("≤", 2),
        unit="s",
    )


def first_202(**settings: str) -> float:
    """Start the service; return the seconds from the start of the process to its first 202."""
    port = free_port()
    with tempfile.TemporaryDirectory() as directory:
        log = Path(directory, "log")
        with log.open("wb") as output:
            began = time.perf_counter()
            process = subprocess.Popen(
                [sys.executable, "-m", "app"],
                cwd=directory,
                env=ENVIRONMENT | {"PORT": str(port)} | settings,
                stdout=output,
                stderr=output,
            )
        try:
            answer = _ask(port)
            seconds = time.perf_counter() - began
        finally:
            process.kill()  # there is no SMTP server, so its mail cannot be sent
            process.wait()
        if not answer.startswith(b"HTTP/1.1 202 "):
            raise Failed(f"no 202, but {answer!r}:\n{log.read_text()}")
    return seconds


def _ask(port: int) -> bytes:
    """Send a request as soon as the server listens; return the answer, or b"" after a timeout."""
    deadline = time.monotonic() + LONGEST_SECONDS
    while time.monotonic() < deadline:
        try:
            connection = socket.create_connection(("127.0.0.1", port), LONGEST_SECONDS)
        except ConnectionRefusedError:
            time.sleep(POLL_SECONDS)
        else:
            with connection:
                connection.sendall(REQUEST)
                return connection.recv(4096)
    return b""


def _import(module: str) -> float:
    began = time.perf_counter()
    subprocess.run(
        [sys.executable, "-c", f"import {module}"],
        cwd=tempfile.gettempdir(),
        env=ENVIRONMENT,
        check=True,
    )
    return time.perf_counter() - began
