"""P1: the cost of a promise for a request.

Requests/s of the durable route with the worker paused, against the tutorial's route with the same
validation and with tasks that do nothing. wrk uses 64 connections. Both run on uvicorn with the
same options.
"""

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from benchmarks.harness import Result, Target, compared, in_turn
from benchmarks.load import fastapi_app, server, wrk, wrk_script

ROUNDS, QUICK_ROUNDS = 11, 5


def measure(quick: bool) -> Iterator[Result]:
    """Measure both routes, in turn."""
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        script = wrk_script(directory)
        bare = stack.enter_context(fastapi_app(directory, "benchmarks.bare:app"))
        ours = stack.enter_context(server(directory, "-m", "app", WORKER_CONCURRENCY="0"))
        wrk(bare.port, script), wrk(ours.port, script)  # to warm up
        rates = in_turn(
            QUICK_ROUNDS if quick else ROUNDS,
            {
                "the promise": lambda: wrk(ours.port, script).rate,
                "the bare route": lambda: wrk(bare.port, script).rate,
            },
        )
    promised, noted = rates.values()
    yield compared(
        "P1",
        "accepting a promise, against the tutorial's bare route",
        promised,
        noted,
        target=Target("≥", 0.9),
        unit="requests/s",
    )
