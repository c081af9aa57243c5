"""P6: the drain rate to an SMTP server with 20 ms latency, against the theoretical maximum.

A mail takes several round trips, so the maximum is connections ÷ (round trips * latency). With 10
connections, 2 round trips and 20 ms, for example, it is 250 mails/s. The sink counts the round
trips of each mail, and measures the true latency of its replies.
"""

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness import Result, Spread, Target, compared, in_turn
from benchmarks.p4_drain import CONNECTIONS, database_with_mails, drain
from benchmarks.sinks import sink

LATENCY = 0.020  # seconds


@dataclass(frozen=True, slots=True)
class Drained:
    """The rate of a drain, with the round trips and the latency that the sink measured."""

    rate: float  # mails per second
    round_trips: float  # for each mail
    latency: float  # seconds

    @property
    def most(self) -> float:
        """The maximum of mails per second for all connections together."""
        return CONNECTIONS / (self.round_trips * self.latency)


def measure(quick: bool) -> Iterator[Result]:
    """Drain copies of the same tasks several times. There is no other contestant."""
    mails, rounds = (500, 2) if quick else (2_000, 5)
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        tasks = database_with_mails(directory, mails)
        receiver = stack.enter_context(sink(latency=LATENCY))

        def drained() -> Drained:
            rate = drain(receiver, directory, tasks, mails)
            return Drained(rate, receiver.round_trips(), receiver.latency())

        reached = in_turn(rounds, {"ours": drained})["ours"]
    ours, most = [drain.rate for drain in reached], [drain.most for drain in reached]
    yield compared(
        "P6",
        f"{mails:,} waiting mails drained with {LATENCY * 1000:g} ms of latency, against the most "
        "that the round trips allow",
        ours,
        most,
        target=Target("≥", 0.95),
        unit="mails/s",
    )
    round_trips = [drain.round_trips for drain in reached]
    yield Result("P6", "round trips for each mail", Spread.of(round_trips))
    latencies = [drain.latency * 1000 for drain in reached]
    yield Result("P6", "the latency in truth", Spread.of(latencies), unit="ms")
