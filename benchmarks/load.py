"""Servers of this repository, and wrk to put them under load."""

import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[1]
CONNECTIONS = 64
SECONDS = 3

# Every request has an address of its own: nothing is gained by remembering one.
SCRIPT = """
local number = 0
wrk.method = "POST"
wrk.headers["Content-Type"] = "application/json"
wrk.body = '{"subject": "Hello", "message": "It is done."}'
request = function()
  number = number + 1
  return wrk.format(nil, "/send-notification/user" .. number .. "@example.com")
end
"""


def wrk_script(directory: Path) -> Path:
    """Write what wrk is to send below `directory`; exits if there is no wrk."""
    if shutil.which("wrk") is None:
        sys.exit("this measure needs wrk (Debian: apt install wrk)")
    script = directory / "post.lua"
    script.write_text(SCRIPT)
    return script


def measure(port: int, script: Path) -> float:
    """Requests per second of one run; every answer must be a 202."""
    command = ["wrk", "-t1", f"-c{CONNECTIONS}", f"-d{SECONDS}s", "-s", str(script)]
    output = subprocess.run(
        [*command, f"http://127.0.0.1:{port}"], check=True, capture_output=True, text=True
    ).stdout
    if "Non-2xx" in output or "Socket errors" in output:
        sys.exit(f"not every request was accepted:\n{output}")
    found = re.search(r"Requests/sec:\s+([\d.]+)", output)
    assert found is not None, output
    return float(found[1])


@contextmanager
def server(directory: Path, *arguments: str, **settings: str) -> Iterator[int]:
    """A server of its own data below `directory`; gives its port."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "PORT": str(port)}
    if "uvicorn" in arguments:
        arguments = (*arguments, "--port", str(port))
    with (directory / f"{port}.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=directory,
            env=environment | settings,
            stdout=log,
            stderr=log,
        )
    try:
        wait_for(port)
        yield port
    finally:
        process.terminate()
        process.wait(20)


def wait_for(port: int) -> None:
    """Return when somebody listens at the port."""
    for _ in range(200):
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.05)
        else:
            return
    sys.exit("the server does not start")
