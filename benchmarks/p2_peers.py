"""P2: requests/s of P1's route, against other queues that store a task before they answer.

Each peer has a FastAPI app with the same route and the same validation. It answers after its
library has stored the task. No worker runs the tasks. Redis waits for its disk before it answers
(`appendfsync always`), like PostgreSQL and SQLite here. wrk uses 64 connections. All take turns.
"""

import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from benchmarks import peers
from benchmarks.harness import Failed, Result, Target, compared, in_turn
from benchmarks.load import (
    fastapi_app,
    require_program,
    server,
    stop_process,
    wait_until_listening,
    wrk,
    wrk_script,
)
from tests.support.postgres import Postgres
from tests.support.service import free_port

ROUNDS, QUICK_ROUNDS = 9, 3
OURS = "ours"
PEERS = {
    "Taskiq on Redis": "taskiq",
    "SAQ on Redis": "saq",
    "Procrastinate on PostgreSQL": "procrastinate",
    "Celery on Redis": "celery",
}


def measure(quick: bool) -> Iterator[Result]:
    """Measure the service and all peers, in turn."""
    python = peers.python()
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        script = wrk_script(directory)
        stores = {
            "REDIS_URL": stack.enter_context(redis(directory)),
            "DATABASE_URL": stack.enter_context(Postgres()).new_database(),
        }
        ours = server(directory, "-m", "app", WORKER_CONCURRENCY="0")
        ports = {OURS: stack.enter_context(ours).port}
        for name, module in PEERS.items():
            app = f"benchmarks.rivals.{module}:app"
            peer = fastapi_app(directory, app, python=python, **stores)
            ports[name] = stack.enter_context(peer).port
        for port in ports.values():
            wrk(port, script)  # to warm up
        rates = in_turn(
            QUICK_ROUNDS if quick else ROUNDS,
            {name: partial(_rate, port, script) for name, port in ports.items()},
        )
    for name in PEERS:
        yield compared(
            "P2",
            f"accepting a promise, against {name}",
            rates[OURS],
            rates[name],
            target=Target("≥", 2),
            unit="requests/s",
        )


def _rate(port: int, script: Path) -> float:
    return wrk(port, script).rate


@contextmanager
def redis(directory: Path) -> Iterator[str]:
    """Run a Redis that has each command on its disk before it answers; yield its URL."""
    port = free_port()
    process = subprocess.Popen(
        [
            require_program("redis-server", "redis-server"),
            *("--port", str(port), "--bind", "127.0.0.1", "--dir", str(directory)),
            *("--appendonly", "yes", "--appendfsync", "always", "--save", ""),
        ],
        stdout=subprocess.DEVNULL,
    )
    try:
        if not wait_until_listening(port, process):
            raise Failed("redis-server does not start")
        yield f"redis://127.0.0.1:{port}"
    finally:
        stop_process(process)
