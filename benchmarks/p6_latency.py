"""P6: how fast a backlog drains to a server that is 20 ms away, against what that allows.

A connection can carry one mail in so many round trips, and no more: connections ÷ (round trips *
latency) is the most. How many round trips a mail takes, and how late the replies truly came, is
what the sink has seen.
"""

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness import Result, Spread, Target, compared, in_turn
from benchmarks.p4_drain import CONNECTIONS, drain, waiting
from benchmarks.sinks import sink

LATENCY = 0.020  # seconds


@dataclass(frozen=True, slots=True)
class Drained:
    """What one drain reached, and what the sink saw of it."""

    rate: float  # mails per second
    round_trips: float  # for each mail
    latency: float  # seconds

    @property
    def most(self) -> float:
        """Mails per second that all connections together can carry."""
        return CONNECTIONS / (self.round_trips * self.latency)


def measure(quick: bool) -> Iterator[Result]:
    """Drain the same tasks over and over; there is nobody to take turns with."""
    mails, rounds = (500, 2) if quick else (2_000, 5)
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        tasks = waiting(directory, mails)
        taker = stack.enter_context(sink(latency=LATENCY))

        def drained() -> Drained:
            rate = drain(taker, directory, tasks, mails)
            return Drained(rate, taker.round_trips(), taker.latency())

        reached = in_turn(rounds, {"ours": drained})["ours"]
    ours, most = [one.rate for one in reached], [one.most for one in reached]
    yield compared(
        "P6",
        f"{mails:,} waiting mails drained with {LATENCY * 1000:g} ms of latency, against the most "
        "that the round trips allow",
        ours,
        most,
        target=Target("≥", 0.95),
        unit="mails/s",
    )
    yield Result("P6", "round trips for each mail", Spread.of([one.round_trips for one in reached]))
    latencies = [one.latency * 1000 for one in reached]
    yield Result("P6", "the latency in truth", Spread.of(latencies), unit="ms")
