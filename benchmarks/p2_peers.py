"""P2: requests/s of P1's route, against peers that keep what they accept as well.

Each peer has a FastAPI app with the same route and the same validation, which answers once its
library has put the task away; nobody runs the tasks. Redis waits for its disk before it answers
(`appendfsync always`), as PostgreSQL does, and SQLite here. wrk has 64 connections; all take turns.
"""

import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from benchmarks import peers
from benchmarks.harness import Failed, Result, Target, compared, in_turn
from benchmarks.load import end, fastapi_app, listens, need, server, wrk, wrk_script
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
    """Measure all, in turn."""
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
    """A Redis that has each command on its disk before it answers; gives its URL."""
    port = free_port()
    process = subprocess.Popen(
        [
            need("redis-server", "redis-server"),
            *("--port", str(port), "--bind", "127.0.0.1", "--dir", str(directory)),
            *("--appendonly", "yes", "--appendfsync", "always", "--save", ""),
        ],
        stdout=subprocess.DEVNULL,
    )
    try:
        if not listens(port, process):
            raise Failed("redis-server does not start")
        yield f"redis://127.0.0.1:{port}"
    finally:
        end(process)
