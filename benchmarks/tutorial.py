"""P1: what a promise costs a request.

Requests/s of the durable route, worker paused, against the tutorial's bare route with the same
validation and a task that does nothing; wrk with 64 connections, the two in turn.
"""

import statistics
import tempfile
from contextlib import ExitStack
from pathlib import Path

from benchmarks.load import measure, server, wrk_script

ROUNDS = 9


def main() -> None:
    """Measure, and print medians and ratios."""
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        script = wrk_script(directory)
        bare = stack.enter_context(
            server(directory, "-m", "uvicorn", "benchmarks.bare:app", "--no-access-log")
        )
        ours = stack.enter_context(server(directory, "-m", "app", WORKER_CONCURRENCY="0"))
        measure(bare, script), measure(ours, script)  # to warm up
        print(f"{'round':>5} {'bare':>8} {'durable':>8} {'ratio':>6}   requests/s")
        ratios = []
        for number in range(1, ROUNDS + 1):
            a, b, c = (measure(port, script) for port in (ours, bare, ours))
            ratios.append((a + c) / 2 / b)
            print(f"{number:>5} {b:>8.0f} {(a + c) / 2:>8.0f} {ratios[-1]:>6.2f}", flush=True)
        print(
            f"P1: median {statistics.median(ratios):.2f}, "
            f"from {min(ratios):.2f} to {max(ratios):.2f}"
        )
