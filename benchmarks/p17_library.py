"""P17: the library without a web server, against other queues that store a task before they go on.

delay      from the call that adds a task to the start of its function: one task at a time, with
           pauses of about 20 ms
tasks/s    empty tasks that are added one by one and run: from the first call to the start of the
           last function. 64 callers add tasks at the same time, or a single thread where that is
           faster

Each measurement has its own process, and a new SQLite file or a new Redis. Each library waits for
the disk before a call returns: Redis has `appendfsync always`, and SQLite `synchronous = FULL`. The
modules in benchmarks/libraries state the other settings, and what happens to a running task when
its worker crashes. All take turns.
"""

import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks import peers
from benchmarks.harness import Result, Target, compared, in_turn, percentile
from benchmarks.load import run_module
from benchmarks.p2_peers import redis

LONGEST_SECONDS = 120  # several times the duration of the slowest library
TWICE_AS_SOON, TWICE_AS_MANY = Target("≤", 0.5), Target("≥", 2)


@dataclass(frozen=True, slots=True)
class Library:
    """A library to compare: its module in benchmarks/libraries, and its interpreter."""

    name: str
    module: str
    python: str
    needs_redis: bool = False

    def seconds(self, verb: str, tasks: int) -> list[float]:
        """Run the library's module, and return the seconds that it prints."""
        with tempfile.TemporaryDirectory() as directory:
            if not self.needs_redis:
                return self._ask(verb, f"{directory}/queue.db", tasks)
            with redis(Path(directory)) as url:
                return self._ask(verb, url, tasks)

    def _ask(self, verb: str, location: str, tasks: int) -> list[float]:
        output = run_module(
            f"benchmarks.libraries.{self.module}",
            *(verb, location, tasks),
            python=self.python,
            longest_seconds=LONGEST_SECONDS,
        )
        seconds: list[float] = json.loads(output)
        return seconds


OURS = Library("ours", "afterward", sys.executable)


def measure(quick: bool) -> Iterator[Result]:
    """Measure the delays, and then the rates."""
    singles, many, rounds = (100, 2_000, 2) if quick else (300, 5_000, 5)
    python = peers.python()
    rivals = [
        Library("Taskiq on Redis", "taskiq", python, needs_redis=True),
        Library("SAQ on Redis", "saq", python, needs_redis=True),
        Library("Huey on SQLite, which loses running tasks in a crash", "huey", python),
        Library("persist-queue on SQLite", "persist_queue", python),
        Library("litequeue on SQLite, which leaves them locked after a crash", "litequeue", python),
    ]
    delays = in_turn(
        rounds, {library.name: partial(_delays, library, singles) for library in [OURS, *rivals]}
    )
    for percent, target in ((50, TWICE_AS_SOON), (99, None)):
        in_ms = {
            name: [percentile(delays_of_round, percent) * 1000 for delays_of_round in all_rounds]
            for name, all_rounds in delays.items()
        }
        for rival in rivals:
            yield compared(
                "P17",
                f"from add_task to the start of the function, p{percent}, against {rival.name}",
                in_ms[OURS.name],
                in_ms[rival.name],
                target=target,
                unit="ms",
            )
    rates = in_turn(
        rounds, {library.name: partial(_rate, library, many) for library in [OURS, *rivals]}
    )
    for rival in rivals:
        yield compared(
            "P17",
            f"empty tasks added and run, against {rival.name}",
            rates[OURS.name],
            rates[rival.name],
            target=TWICE_AS_MANY,
            unit="tasks/s",
        )


def _delays(library: Library, tasks: int) -> list[float]:
    return library.seconds("idle", tasks)


def _rate(library: Library, tasks: int) -> float:
    (seconds,) = library.seconds("busy", tasks)
    return tasks / seconds
