"""Start servers and modules of this repository and of rivals; put servers under load with wrk."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness import Failed

ROOT = Path(__file__).parents[1]
CONNECTIONS = 64
SECONDS = 3
MB = 1_000_000
LONGEST_START = 20  # seconds
STOP_SECONDS = 5  # after these a server that does not stop is killed

# wrk counts an answer after this time as an error. A shorter wait counts only as latency.
TIMEOUT = ("--timeout", "10s")

# The options with which `python -m app` runs uvicorn, for the other apps.
UVICORN_OPTIONS = (
    *("--loop", "uvloop", "--http", "httptools", "--ws", "none"),
    *("--no-access-log", "--no-proxy-headers", "--no-server-header"),
)

# docs/settings.md recommends these where mail is most of the work: while 10 tasks use the SMTP
# connections, the other 30 are being claimed or settled in the database.
FOR_MAIL = {"WORKER_CONCURRENCY": "40", "SMTP_CONNECTIONS": "10"}

# Every request has a new address, so that no cache of addresses helps. wrk's usual output is
# rounded, so the script prints exact figures in a last line.
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
    """A running server: its port, its process and its log file."""

    port: int
    process: subprocess.Popen[bytes]
    log: Path


@dataclass(frozen=True, slots=True)
class Load:
    """The result of a run of wrk in which every request was accepted."""

    requests: int
    rate: float  # requests per second
    p99: float  # seconds from a request to its answer


def require_program(program: str, package: str) -> str:
    """Return the path of a program, or exit with a line that names its Debian package."""
    if (path := shutil.which(program)) is None:
        sys.exit(f"this needs {program} (Debian: apt install {package})")
    return path


def wrk_script(directory: Path) -> Path:
    """Write the script for wrk into `directory`, and return its path. Exit if wrk is missing."""
    require_program("wrk", "wrk")
    script = directory / "post.lua"
    script.write_text(SCRIPT)
    return script


def wrk(port: int, script: Path, *, connections: int = CONNECTIONS, seconds: int = SECONDS) -> Load:
    """Send requests as fast as they are answered, one at a time on each connection.

    Raise Failed unless every answer is a 2xx.
    """
    command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", *TIMEOUT, "-s", str(script)]
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
    """Run another app, such as `benchmarks.bare:app`, with the uvicorn options of the service."""
    return server(directory, "-m", "uvicorn", app, *UVICORN_OPTIONS, python=python, **settings)


@contextmanager
def server(
    directory: Path, *arguments: str, python: str = sys.executable, **settings: str
) -> Iterator[Server]:
    """Run a server in `directory`. Raise Failed if it does not start."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "PORT": str(port)}
    environment["ACCESS_LOG"] = "false"  # like --no-access-log in UVICORN_OPTIONS
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
        if not wait_until_listening(port, process):
            raise Failed(f"the server does not start:\n{log.read_text()[-2000:]}")
        yield Server(port, process, log)
    finally:
        stop_process(process)


def megabytes(running: Server) -> float:
    """Return the resident memory of a server."""
    status = Path(f"/proc/{running.process.pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) * 1024 / MB


def run_module(module: str, *arguments: object, python: str, longest_seconds: float) -> str:
    """Run a module of this repository, and return its output.

    Raise Failed if it fails, and TimeoutExpired if it takes too long.
    """
    with subprocess.Popen(
        [python, "-m", module, *map(str, arguments)],
        cwd=tempfile.gettempdir(),
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            output, errors = process.communicate(timeout=longest_seconds)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)  # with all its child processes
            raise
    if process.returncode:
        raise Failed(f"{module} {' '.join(map(str, arguments))} failed:\n{errors}")
    return output


def stop_process(process: subprocess.Popen[bytes]) -> None:
    """Stop a process, and kill it if it is still busy after STOP_SECONDS."""
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def wait_until_listening(port: int, process: subprocess.Popen[bytes]) -> bool:
    """Wait until the process listens at the port. Return False if it ends, or takes too long."""
    deadline = time.monotonic() + LONGEST_START
    while process.poll() is None and time.monotonic() < deadline:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.05)
        else:
            return True
    return False
