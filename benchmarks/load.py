"""Servers of this repository and of its rivals, and wrk to put them under load."""

import json
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness import Failed

ROOT = Path(__file__).parents[1]
CONNECTIONS = 64
SECONDS = 3
LONGEST_START = 20  # seconds
LAST_WORDS = 5  # seconds in which a server may stop by itself

# Whoever waits longer than that is not served; within it, a wait is a figure and no error.
PATIENT = ("--timeout", "10s")

# What `python -m app` sets, for whatever else takes part.
AS_OURS = (
    *("--loop", "uvloop", "--http", "httptools", "--ws", "none"),
    *("--no-access-log", "--no-proxy-headers", "--no-server-header"),
)

# What README.md recommends where mail is most of the work: while some tasks are on their way
# through the SMTP connections, others are begun and ended in the database.
FOR_MAIL = {"WORKER_CONCURRENCY": "40", "SMTP_CONNECTIONS": "10"}

# Every request has an address of its own: nothing is gained by remembering one. wrk's own output is
# for people, and rounds: the last line here is for us.
SCRIPT = """
local number = 0
wrk.method = "POST"
wrk.headers["Content-Type"] = "application/json"
wrk.body = '{"subject": "Hello", "message": "It is done."}'
request = function()
  number = number + 1
  return wrk.format(nil, "/send-notification/user" .. number .. "@example.com")
end
done = function(summary, latency, requests)
  local errors = summary.errors
  io.write(string.format(
    '\\n{"answered": %d, "microseconds": %d, "p99_microseconds": %d, "failed": %d}\\n',
    summary.requests, summary.duration, latency:percentile(99),
    errors.connect + errors.read + errors.write + errors.status + errors.timeout
  ))
end
"""


@dataclass(frozen=True, slots=True)
class Server:
    """One that runs, and where to reach it."""

    port: int
    process: subprocess.Popen[bytes]
    log: Path


@dataclass(frozen=True, slots=True)
class Load:
    """What wrk saw; every request was accepted."""

    requests: int
    rate: float  # requests per second
    p99: float  # seconds from a request to its answer


def need(program: str, package: str) -> str:
    """Where a program is; without it, the process ends with a line that names Debian's package."""
    if (path := shutil.which(program)) is None:
        sys.exit(f"this needs {program} (Debian: apt install {package})")
    return path


def wrk_script(directory: Path) -> Path:
    """Write what wrk is to send below `directory`; the process ends if there is no wrk."""
    need("wrk", "wrk")
    script = directory / "post.lua"
    script.write_text(SCRIPT)
    return script


def wrk(port: int, script: Path, *, connections: int = CONNECTIONS, seconds: int = SECONDS) -> Load:
    """Send as many requests as are answered, each connection one at a time.

    Raises Failed unless every answer is a 2xx.
    """
    command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", *PATIENT, "-s", str(script)]
    output = subprocess.run(
        [*command, f"http://127.0.0.1:{port}"], check=True, capture_output=True, text=True
    ).stdout
    seen = json.loads(output.splitlines()[-1])
    if seen["failed"] or not seen["answered"]:
        raise Failed(f"not every request was accepted:\n{output}")
    return Load(
        seen["answered"],
        seen["answered"] / (seen["microseconds"] / 1e6),
        seen["p99_microseconds"] / 1e6,
    )


def fastapi_app(
    directory: Path, app: str, *, python: str = sys.executable, **settings: str
) -> AbstractContextManager[Server]:
    """A server of another app, such as `benchmarks.bare:app`, under uvicorn as ours is."""
    return server(directory, "-m", "uvicorn", app, *AS_OURS, python=python, **settings)


@contextmanager
def server(
    directory: Path, *arguments: str, python: str = sys.executable, **settings: str
) -> Iterator[Server]:
    """A server that works in `directory`; raises Failed if it does not start."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "PORT": str(port)}
    environment["ACCESS_LOG"] = "false"  # as AS_OURS says of the others
    if "uvicorn" in arguments:
        arguments = (*arguments, "--port", str(port))
    log = directory / f"{port}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [python, *arguments],
            cwd=directory,
            env=environment | settings,
            stdout=output,
            stderr=output,
        )
    try:
        if not listens(port, process):
            raise Failed(f"the server does not start:\n{log.read_text()[-2000:]}")
        yield Server(port, process, log)
    finally:
        end(process)


def end(process: subprocess.Popen[bytes]) -> None:
    """Have a process stop; one that is busy with what nobody waits for any more is killed."""
    process.terminate()
    try:
        process.wait(LAST_WORDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def listens(port: int, process: subprocess.Popen[bytes]) -> bool:
    """Wait until the process listens at the port; False if it ends before, or takes too long."""
    deadline = time.monotonic() + LONGEST_START
    while process.poll() is None and time.monotonic() < deadline:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.05)
        else:
            return True
    return False
