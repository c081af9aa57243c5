"""P10: the queue on PostgreSQL, against SQLite and against other queues on the same server.

accepted   requests/s of P1's route, the worker paused, on PostgreSQL and on SQLite
drained    tasks/s that one worker runs which do nothing, ten at once and a hundred at once
put        tasks/s written: one by one for 64 callers at once, and a hundred at a time for one

All take turns; each put and each drain in a process of its own, on a database of its own. The
server's settings are its defaults: it waits for the disk at each commit. A round that another queue
does not finish is told with the figures of its other rounds.
"""

import os
import signal
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
from benchmarks.harness import Failed, Result, Spread, Target, compared, in_turn
from benchmarks.load import ROOT, server, wrk, wrk_script
from tests.support.postgres import Postgres

FEW, MANY = 10, 100  # how many tasks a worker runs at once
LONGEST_SECONDS = 90  # several times what the slowest takes

Way = TypeVar("Way", int, str)
Rates = list[float | None]  # tasks per second; None for a round that was not finished


@dataclass(frozen=True, slots=True)
class Queue:
    """One that takes part: its name, its module, the Python that has it, and what to reach."""

    name: str
    module: str
    python: str
    drained: float = 0.0  # how many times what it drains ours should
    knows_batches: bool = True  # it can add several tasks at once

    def ask(self, *arguments: object) -> float:
        """Have something done in a process of its own; gives the seconds it took.

        Raises Failed if the process does, and TimeoutExpired if it takes too long.
        """
        with subprocess.Popen(
            [self.python, "-m", f"benchmarks.queues.{self.module}", *map(str, arguments)],
            cwd=tempfile.gettempdir(),
            env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        ) as process:
            try:
                output, errors = process.communicate(timeout=LONGEST_SECONDS)
            except BaseException:
                os.killpg(process.pid, signal.SIGKILL)  # it, and whatever it has started
                raise
        if process.returncode:
            raise Failed(f"{self.name}: {' '.join(map(str, arguments))} failed:\n{errors}")
        return float(output)


OURS = Queue("ours", "afterward", sys.executable)


def measure(quick: bool) -> Iterator[Result]:
    """Measure what is accepted, what is drained, and what is put."""
    tasks, rounds = (2_000, 2) if quick else (6_000, 3)
    python = peers.python()
    pgqueuer = Queue("PGQueuer", "pgqueuer", python, drained=0.4)
    procrastinate = Queue("Procrastinate", "procrastinate", python, drained=4)
    saq = Queue("SAQ", "saq", python, drained=4, knows_batches=False)
    rivals = [pgqueuer, procrastinate, saq]
    with Postgres() as postgres:
        yield _accepted(postgres, rounds)

        # PGQueuer runs at once whatever it has claimed, so the claim's size is all there is to set.
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

        for what, verb, those in (
            ("put by 64 callers", "put", rivals),
            ("put in hundreds", "put-batches", [rival for rival in rivals if rival.knows_batches]),
        ):
            put = partial(_put, postgres, tasks // 2)
            rates = _in_turn_with_ours(put, those, [verb], rounds)
            for rival in those:
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
    """The line on the rounds that both finished, which says how many the other did not."""
    pairs = [(a, b) for a, b in zip(ours, theirs, strict=True) if a is not None and b is not None]
    if unfinished := theirs.count(None):
        what += f", which did not finish {unfinished} of {len(theirs)} rounds"
    if not pairs:
        return Result("P10", what, Spread.of([0.0]), unit="rounds")
    return compared("P10", what, *zip(*pairs, strict=True), target=target, unit="tasks/s")


def _drain(postgres: Postgres, tasks: int, queue: Queue, concurrency: int) -> float:
    """Put tasks, and give how many a second are drained."""
    with _database(postgres, queue) as url:
        queue.ask("put-batches" if queue.knows_batches else "put", url, tasks)
        # As it would be in the midst of work: the planner knows the tables, and nothing is left
        # to be written of what was done before.
        postgres.sql("VACUUM ANALYZE", url)
        postgres.sql("CHECKPOINT", url)
        return tasks / queue.ask("drain", url, tasks, concurrency)


def _put(postgres: Postgres, tasks: int, queue: Queue, verb: str) -> float:
    """Give how many tasks a second are put."""
    with _database(postgres, queue) as url:
        return tasks / queue.ask(verb, url, tasks)


@contextmanager
def _database(postgres: Postgres, queue: Queue) -> Iterator[str]:
    """A database that has a queue's tables."""
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
