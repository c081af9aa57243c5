"""P15: the cost of open dashboards for requests, and in memory.

P1's requests/s, and the memory of the service, while 200 dashboards hold their event stream open,
against the same while none is open. Meanwhile the worker runs 100 tasks/s: its ten slots wait for
an SMTP server that answers after 50 ms, twice for each mail.
"""

import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path

from benchmarks.harness import Result, Spread, Target, compared, in_turn
from benchmarks.load import Server, megabytes, server, wrk, wrk_script
from benchmarks.readers import readers
from benchmarks.sinks import Sink, sink

DASHBOARDS = 200
STREAM = "/board/live?part=numbers"  # as the overview does
SECONDS = 5  # a dashboard gets an event a second, so a turn has several
LATENCY = 0.05  # of the SMTP server
ROUNDS, QUICK_ROUNDS = 9, 3
STARTS, QUICK_STARTS = 3, 1  # of a service, to measure its memory


def measure(quick: bool) -> Iterator[Result]:
    """Measure with and without dashboards, in turn."""
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        script = wrk_script(directory)
        receiver = stack.enter_context(sink(latency=LATENCY))
        running = stack.enter_context(_service(directory, receiver))
        contestants = {
            "open": lambda: _rate(running, script, DASHBOARDS),
            "none": lambda: _rate(running, script, 0),
        }
        in_turn(1, contestants)  # to warm up
        rates = in_turn(QUICK_ROUNDS if quick else ROUNDS, contestants)
        memory = in_turn(
            QUICK_STARTS if quick else STARTS,
            {
                "open": lambda: _memory(receiver, script, DASHBOARDS),
                "none": lambda: _memory(receiver, script, 0),
            },
        )
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


def _service(directory: Path, receiver: Sink) -> AbstractContextManager[Server]:
    smtp = {"SMTP_PORT": str(receiver.port)}
    return server(directory, "-m", "app", MAX_BACKLOG="100000000", **smtp)


def _rate(running: Server, script: Path, dashboards: int) -> float:
    with _open(running, dashboards):
        return wrk(running.port, script, seconds=SECONDS).rate


def _memory(receiver: Sink, script: Path, dashboards: int) -> float:
    """Return the megabytes of a new service after the same load."""
    with (
        tempfile.TemporaryDirectory() as name,
        _service(Path(name), receiver) as running,
        _open(running, dashboards),
    ):
        wrk(running.port, script, seconds=SECONDS)
        return megabytes(running)


def _open(running: Server, dashboards: int) -> AbstractContextManager[None]:
    return readers(running.port, STREAM, dashboards) if dashboards else nullcontext()
