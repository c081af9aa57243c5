"""P1b: the cost of a promise for a request while the mails are being sent.

Requests/s and p99 latency of the durable route with its worker, against the tutorial's route, which
sends with aiosmtplib in `BackgroundTasks`, over a new connection for each mail. Both send to the
same sink. wrk uses 64 connections.

Neither sends as fast as it accepts, so both build up a backlog: the service on disk, with at most
ten running tasks, and the tutorial's route as running tasks, each with its connection. Before the
next turn the backlog is sent, which is not timed. So this measures three seconds of overload. P5
measures the rate that each can sustain.
"""

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

from benchmarks.harness import Failed, Result, Target, compared, in_turn, progress
from benchmarks.load import Load, fastapi_app, server, wrk, wrk_script
from benchmarks.sinks import Sink, sink

ROUNDS, QUICK_ROUNDS = 9, 3
QUIET = 1.0  # seconds without a mail until the backlog counts as sent
PATIENCE = 15.0  # seconds without a mail until missing mails count as lost


def measure(quick: bool) -> Iterator[Result]:
    """Measure both routes, in turn."""
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        script = wrk_script(directory)
        receiver = stack.enter_context(sink())
        smtp = {"SMTP_PORT": str(receiver.port)}
        ours = stack.enter_context(server(directory, "-m", "app", **smtp))
        tutorial = fastapi_app(directory, "benchmarks.rivals.aiosmtplib:app", **smtp)
        theirs = stack.enter_context(tutorial)

        def load(port: int) -> Callable[[], Load]:
            return lambda: wait_for_mails(receiver, wrk(port, script))

        contestants = {"ours": load(ours.port), "the tutorial's": load(theirs.port)}
        in_turn(1, contestants)  # to warm up
        promised, noted = in_turn(QUICK_ROUNDS if quick else ROUNDS, contestants).values()
    rates = [load.rate for load in promised], [load.rate for load in noted]
    slowest = [load.p99 * 1000 for load in promised], [load.p99 * 1000 for load in noted]
    yield compared(
        "P1b",
        "accepting promises while sending, against the tutorial's route with aiosmtplib",
        *rates,
        target=Target("≥", 1.5),
        unit="requests/s",
    )
    yield compared("P1b", "the same, p99", *slowest, target=Target("≤", 0.5), unit="ms")


def wait_for_mails(receiver: Sink, load: Load) -> Load:
    """Wait until all mails of a load have arrived, then reset the sink. Return the load.

    Raise Failed if mails are missing.
    """
    count, since = -1, time.monotonic()
    while (quiet := time.monotonic() - since) < QUIET or count < load.requests:
        progress(f"{load.requests - count} mails are still to come")
        if quiet > PATIENCE:
            raise Failed(f"only {count} mails of {load.requests} requests have come")
        time.sleep(0.1)
        if count != (count := receiver.count()):
            since = time.monotonic()
    receiver.reset()
    return load
