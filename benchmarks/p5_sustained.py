"""P5: what can be taken for long: mails accepted and delivered at once, under 50 clients.

wrk sends for 20 seconds as much as it can over 50 connections; what arrives at the sink is counted,
but for the first two seconds. The rivals are FastAPI apps with the same route that send in
`BackgroundTasks`, a connection for each mail. Each turn has a service and a sink of its own; what a
service has accepted and not sent when the time is over is not waited for.
"""

import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from pathlib import Path

from benchmarks import peers
from benchmarks.harness import Result, Target, compared, in_turn
from benchmarks.load import FOR_MAIL, Server, fastapi_app, server, wrk, wrk_script
from benchmarks.sinks import sink

CONNECTIONS = 50
SECONDS, QUICK_SECONDS = 20, 8
SETTLING = 2
ROUNDS, QUICK_ROUNDS = 3, 1
OURS = "ours"
RIVALS = {
    "fastapi-mail": "fastapi_mail",
    "aiosmtplib": "aiosmtplib",
    "smtplib": "smtplib",
}

Start = Callable[..., AbstractContextManager[Server]]


def measure(quick: bool) -> Iterator[Result]:
    """Measure all, in turn."""
    python = peers.python()
    seconds = QUICK_SECONDS if quick else SECONDS
    starts: dict[str, Start] = {
        OURS: lambda at, **smtp: server(at, "-m", "app", **FOR_MAIL, **smtp)
    }
    for name, module in RIVALS.items():
        starts[name] = partial(fastapi_app, app=f"benchmarks.rivals.{module}:app", python=python)
    rates = in_turn(
        QUICK_ROUNDS if quick else ROUNDS,
        {name: partial(_delivered, start, seconds) for name, start in starts.items()},
    )
    for name in RIVALS:
        yield compared(
            "P5",
            f"accepted and delivered for {seconds} s, against {name} in BackgroundTasks",
            rates[OURS],
            rates[name],
            target=Target("≥", 2),
            unit="mails/s",
        )


def _delivered(start: Start, seconds: int) -> float:
    """Mails per second that came to the sink."""
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        taker = stack.enter_context(sink())
        service = stack.enter_context(start(directory, SMTP_PORT=str(taker.port)))
        thread = stack.enter_context(ThreadPoolExecutor(1))
        load = thread.submit(
            wrk, service.port, wrk_script(directory), connections=CONNECTIONS, seconds=seconds
        )
        time.sleep(SETTLING)
        before, began = taker.count(), time.monotonic()
        time.sleep(seconds - SETTLING)
        rate = (taker.count() - before) / (time.monotonic() - began)
        load.result()
    return rate
