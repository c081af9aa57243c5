"""P5: the sustained rate of mails accepted and delivered, with 50 clients.

wrk sends as fast as it can over 50 connections for 20 seconds. The sink counts the mails, except in
the first two seconds. The rivals are FastAPI apps with the same route. They send in
`BackgroundTasks`, over a new connection for each mail. Each turn has a new service and a new sink.
Mails that were accepted and not sent by the end do not count.
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
SETTLING = 2  # seconds at the beginning that do not count
ROUNDS, QUICK_ROUNDS = 3, 1
OURS = "ours"
RIVALS = {
    "fastapi-mail": "fastapi_mail",
    "aiosmtplib": "aiosmtplib",
    "smtplib": "smtplib",
}

Start = Callable[..., AbstractContextManager[Server]]


def measure(quick: bool) -> Iterator[Result]:
    """Measure the service and all rivals, in turn."""
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
    """Return the mails per second that arrived at the sink."""
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        receiver = stack.enter_context(sink())
        service = stack.enter_context(start(directory, SMTP_PORT=str(receiver.port)))
        thread = stack.enter_context(ThreadPoolExecutor(1))
        load = thread.submit(
            wrk, service.port, wrk_script(directory), connections=CONNECTIONS, seconds=seconds
        )
        time.sleep(SETTLING)
        before, began = receiver.count(), time.monotonic()
        time.sleep(seconds - SETTLING)
        rate = (receiver.count() - before) / (time.monotonic() - began)
        load.result()
    return rate
