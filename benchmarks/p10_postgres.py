"""P10: the queue on PostgreSQL, against SQLite and against other queues on the same server.

accepted   requests/s of P1's route, the worker paused, on PostgreSQL and on SQLite
drained    empty tasks/s that a worker runs, 10 and 100 at the same time
put        tasks/s written: singly by 64 concurrent callers, and by one caller in batches of 100

All take turns. Each put and each drain has its own process and its own database. PostgreSQL has its
default settings, so it waits for the disk at each commit. If another queue does not finish a round,
the result names the number of such rounds, and uses the others.
"""

import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from benchmarks import peers
from benchmarks.harness import Result, Spread, Target, compared, in_turn
from benchmarks.load import run_module, server, wrk, wrk_script
from tests.support.postgres import Postgres

FEW, MANY = 10, 100  # tasks that a worker runs at the same time
LONGEST_SECONDS = 90  # several times the duration of the slowest queue

Way = TypeVar("Way", int, str)
Rates = list[float | None]  # tasks per second; None for a round that was not finished


@dataclass(frozen=True, slots=True)
class Queue:
    """A queue to compare: its name, its module, its Python interpreter and its target."""

    name: str
    module: str
    python: str
    drained: float = 0.0  # the target: our drain rate ÷ its drain rate
    knows_batches: bool = True  # whether it can add several tasks in one call

    def ask(self, *arguments: object) -> float:
        """Run the queue's module with these arguments; return the seconds that it prints.

        Raise Failed if the process fails, and TimeoutExpired if it takes too long.
        """
        return float(
            run_module(
                f"benchmarks.queues.{self.module}",
                *arguments,
                python=self.python,
                longest_seconds=LONGEST_SECONDS,
            )
        )


OURS = Queue("ours", "afterward", sys.executable)


def measure(quick: bool) -> Iterator[Result]:
    """Measure accepting requests, draining a queue, and putting tasks."""
    tasks, rounds = (2_000, 2) if quick else (6_000, 3)
    python = peers.python()
    pgqueuer = Queue("PGQueuer", "pgqueuer", python, drained=0.4)
    procrastinate = Queue("Procrastinate", "procrastinate", python, drained=4)
    saq = Queue("SAQ", "saq", python, drained=4, knows_batches=False)
    rivals = [pgqueuer, procrastinate, saq]
    with Postgres() as postgres:
        yield _accepted(postgres, rounds)

        # PGQueuer runs all tasks of a claim at the same time, so only the claim's size can be set.
        drain = partial(_drain, postgres, tasks)
        rates = _in_turn_with_ours(drain, rivals, [FEW, MANY], rounds)
        for concurrency in (FEW, MANY):
            for rival in rivals:
                yield _compared(
                    f"tasks drained, {concurrency} at once, against {rival.name}",
                    rates[f"ours, {concurrency}"],
                    rates[f"{rival.name}, {concurrency}"],
                    target=Target("≥", rival.drained),
                )
        yield _compared(
            f"tasks drained, {FEW} at once, against {pgqueuer.name} in claims of {MANY}",
            rates[f"ours, {FEW}"],
            rates[f"{pgqueuer.name}, {MANY}"],
        )

        for what, verb, queues in (
            ("put by 64 callers", "put", rivals),
            ("put in hundreds", "put-batches", [rival for rival in rivals if rival.knows_batches]),
        ):
            put = partial(_put, postgres, tasks // 2)
            rates = _in_turn_with_ours(put, queues, [verb], rounds)
            for rival in queues:
                yield _compared(
                    f"tasks {what}, against {rival.name}",
                    rates[f"ours, {verb}"],
                    rates[f"{rival.name}, {verb}"],
                )


def _accepted(postgres: Postgres, rounds: int) -> Result:
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        script = wrk_script(directory)
        OURS.ask("make", url := postgres.new_database())
        paused = {"WORKER_CONCURRENCY": "0"}
        ours = stack.enter_context(server(directory, "-m", "app", QUEUE_URL=url, **paused))
        on_sqlite = stack.enter_context(server(directory, "-m", "app", **paused))
        contestants = {
            "on PostgreSQL": lambda: wrk(ours.port, script).rate,
            "on SQLite": lambda: wrk(on_sqlite.port, script).rate,
        }
        in_turn(1, contestants)  # to warm up
        rates = in_turn(3 * rounds, contestants)
    return compared(
        "P10",
        "accepting a promise on PostgreSQL, against SQLite",
        rates["on PostgreSQL"],
        rates["on SQLite"],
        target=Target("≥", 0.9),
        unit="requests/s",
    )


def _compared(what: str, ours: Rates, theirs: Rates, *, target: Target | None = None) -> Result:
    """Compare the rounds that both finished, and name the number of rounds without a result."""
    pairs = [(a, b) for a, b in zip(ours, theirs, strict=True) if a is not None and b is not None]
    if unfinished := theirs.count(None):
        what += f", which did not finish {unfinished} of {len(theirs)} rounds"
    if not pairs:
        return Result("P10", what, Spread.of([0.0]), unit="rounds")
    return compared("P10", what, *zip(*pairs, strict=True), target=target, unit="tasks/s")


def _drain(postgres: Postgres, tasks: int, queue: Queue, concurrency: int) -> float:
    """Put tasks, drain them, and return the drained tasks per second."""
    with _database(postgres, queue) as url:
        queue.ask("put-batches" if queue.knows_batches else "put", url, tasks)
        # As in normal operation: the planner has statistics, and no writes of the puts are left
        # for the next checkpoint.
        postgres.sql("VACUUM ANALYZE", url)
        postgres.sql("CHECKPOINT", url)
        return tasks / queue.ask("drain", url, tasks, concurrency)


def _put(postgres: Postgres, tasks: int, queue: Queue, verb: str) -> float:
    """Put tasks, and return the tasks per second."""
    with _database(postgres, queue) as url:
        return tasks / queue.ask(verb, url, tasks)


@contextmanager
def _database(postgres: Postgres, queue: Queue) -> Iterator[str]:
    """Create a database with a queue's tables, and drop it afterwards."""
    url = postgres.new_database()
    try:
        queue.ask("make", url)
        yield url
    finally:
        postgres.sql(f"DROP DATABASE {url.rpartition('/')[2]} WITH (FORCE)")


def _in_turn_with_ours(
    do: Callable[[Queue, Way], float], rivals: list[Queue], ways: list[Way], rounds: int
) -> dict[str, Rates]:
    def attempt(queue: Queue, way: Way) -> float | None:
        try:
            return do(queue, way)
        except subprocess.TimeoutExpired:
            if queue is OURS:
                raise
            return None

    return in_turn(
        rounds,
        {
            f"{queue.name}, {way}": partial(attempt, queue, way)
            for way in ways
            for queue in (OURS, *rivals)
        },
    )
