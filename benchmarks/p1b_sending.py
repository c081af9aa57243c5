"""P1b: what a promise costs a request while the mails are being sent.

Requests/s, and the time that 99 of 100 requests do not exceed (p99), of the durable route with its
worker, against the tutorial's route that sends with aiosmtplib in `BackgroundTasks`, a connection
for each mail. Both send to one sink; wrk with 64 connections.

Neither sends as fast as it accepts, so both pile up mails: ours on the disk, with at most ten in
the making, the tutorial's route as running tasks, each with a connection. Before the next takes its
turn, what was piled up is sent, which is not timed. So this is how both take three seconds of more
than they can send; what they can take for long, accepting and sending, is P5.
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
QUIET = 1.0  # seconds without a mail, after which none is on its way
PATIENCE = 15.0  # seconds without a mail, after which those that are missing will not come


def measure(quick: bool) -> Iterator[Result]:
    """Measure both, in turn."""
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        script = wrk_script(directory)
        taker = stack.enter_context(sink())
        smtp = {"SMTP_PORT": str(taker.port)}
        ours = stack.enter_context(server(directory, "-m", "app", **smtp))
        tutorial = fastapi_app(directory, "benchmarks.rivals.aiosmtplib:app", **smtp)
        theirs = stack.enter_context(tutorial)

        def load(port: int) -> Callable[[], Load]:
            return lambda: drained(taker, wrk(port, script))

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


def drained(taker: Sink, load: Load) -> Load:
    """Wait until all the mails of a load have been sent, and forget them.

    Raises Failed if some do not come.
    """
    count, since = -1, time.monotonic()
    while (quiet := time.monotonic() - since) < QUIET or count < load.requests:
        progress(f"{load.requests - count} mails are still to come")
        if quiet > PATIENCE:
            raise Failed(f"only {count} mails of {load.requests} requests have come")
        time.sleep(0.1)
        if count != (count := taker.count()):
            since = time.monotonic()
    taker.reset()
    return load
