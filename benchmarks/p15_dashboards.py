"""P15: the cost of open dashboards for requests, and in memory.

P1's requests/s, and the memory of the service, while 200 dashboards hold their event stream open,
against the same while none is open. Meanwhile the worker runs 100 tasks/s: its ten slots wait for
an SMTP server that answers after 50 ms, twice for each mail.
"""

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from pathlib import Path

from benchmarks.harness import Result, Spread, Target, compared, in_turn
from benchmarks.load import Server, megabytes, server, wrk, wrk_script
from benchmarks.readers import readers
from benchmarks.sinks import sink

DASHBOARDS = 200
STREAM = "/board/live"
SECONDS = 5  # a dashboard gets an event a second, so a turn has several
LATENCY = 0.05  # of the SMTP server
ROUNDS, QUICK_ROUNDS = 9, 3


def measure(quick: bool) -> Iterator[Result]:
    """Measure with and without dashboards, in turn."""
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        script = wrk_script(directory)
        receiver = stack.enter_context(sink(latency=LATENCY))
        running = stack.enter_context(
            server(directory, "-m", "app", SMTP_PORT=str(receiver.port), MAX_BACKLOG="100000000")
        )
        contestants = {
            "open": lambda: _load(running, script, DASHBOARDS),
            "none": lambda: _load(running, script, 0),
        }
        in_turn(1, contestants)  # to warm up
        turns = in_turn(QUICK_ROUNDS if quick else ROUNDS, contestants)
    rates = {name: [rate for rate, _ in several] for name, several in turns.items()}
    memory = {name: [used for _, used in several] for name, several in turns.items()}
    yield compared(
        "P15",
        f"accepting a promise while {DASHBOARDS} dashboards are open, against none",
        rates["open"],
        rates["none"],
        target=Target("≥", 0.9),
        unit="requests/s",
    )
    yield Result(
        "P15",
        f"memory while {DASHBOARDS} dashboards are open, beyond that while none is",
        Spread.of([a - b for a, b in zip(memory["open"], memory["none"], strict=True)]),
        unit="MB",
        ours=Spread.of(memory["open"]),
        theirs=Spread.of(memory["none"]),
        figures_unit="MB",
    )


def _load(running: Server, script: Path, dashboards: int) -> tuple[float, float]:
    """Return the requests/s, and the memory in megabytes at the end."""
    with readers(running.port, STREAM, dashboards) if dashboards else nullcontext():
        return wrk(running.port, script, seconds=SECONDS).rate, megabytes(running)
