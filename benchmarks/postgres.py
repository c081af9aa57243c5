"""P10: the queue on PostgreSQL, side by side with its peers on one server.

accepted    requests/s of the durable route, worker paused, on PostgreSQL and on SQLite
put         tasks/s written: one by one for 64 callers at once, and a hundred at a time for one
drained     tasks/s that one worker runs which do nothing, of 20,000 that wait

TASKS are put and drained, in each of ROUNDS rounds, within which all take turns; each put and each
drain in a process of its own, on a database of its own. The server's settings are its defaults: it
waits for the disk at each commit.
"""

import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from benchmarks import peers
from benchmarks.load import ROOT, measure, server, wrk_script
from tests.support.postgres import Postgres

TASKS = int(os.environ.get("TASKS", "20000"))
ROUNDS = int(os.environ.get("ROUNDS", "3"))
FEW, MANY = 10, 100  # how many tasks a worker runs at once
PUT_BY_CALLERS = min(TASKS, 5000)
LONGEST_SECONDS = 900

ACCEPTED = "accepted"
BY_CALLERS = "put by 64 callers"
IN_BATCHES = "put in hundreds"

Figure = tuple[str, str, float]  # what was measured, of whom, times per second


@dataclass(frozen=True)
class Queue:
    """One that takes part: its name, its module, and the Python that has it."""

    name: str
    module: str
    python: str
    knows_batches: bool = True  # it can add several tasks at once

    def ask(self, *arguments: object) -> float:
        """Have something done in a process of its own; gives the seconds it took."""
        done = subprocess.run(
            [self.python, "-m", f"benchmarks.queues.{self.module}", *map(str, arguments)],
            cwd=tempfile.gettempdir(),
            env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT)},
            check=False,
            capture_output=True,
            text=True,
            timeout=LONGEST_SECONDS,
        )
        if done.returncode:
            sys.exit(f"{self.name}: {' '.join(map(str, arguments))} failed:\n{done.stderr}")
        return float(done.stdout)


OURS = Queue("ours", "afterward", sys.executable)
PGQUEUER = "PGQueuer"


def main() -> None:
    """Measure, and print one table."""
    python = peers.python()
    queues = [
        OURS,
        Queue(PGQUEUER, "pgqueuer", python),
        Queue("Procrastinate", "procrastinate", python),
        Queue("SAQ", "saq", python, knows_batches=False),
    ]
    figures: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    with Postgres() as postgres:
        version = postgres.sql("SHOW server_version").split()[0]
        with requests(postgres) as measure_both:
            for number in range(1, ROUNDS + 1):
                progress(f"round {number} of {ROUNDS}: requests")
                collect(figures, measure_both())
        for number in range(1, ROUNDS + 1):
            for queue in queues:
                progress(f"round {number} of {ROUNDS}: {queue.name}")
                collect(figures, tasks(postgres, queue))
    progress("")
    print_table(figures)
    names = ("pgqueuer", "procrastinate", "saq", "asyncpg", "psycopg", "uvloop")
    print(
        f"\n{TASKS} tasks, {ROUNDS} rounds; {os.cpu_count()} cores, {processor()}; "
        f"Python {platform.python_version()}, PostgreSQL {version}, {peers.versions(*names)}; "
        f"{datetime.now(UTC):%Y-%m-%d}"
    )


@contextmanager
def requests(postgres: Postgres) -> Iterator[Callable[[], Iterator[Figure]]]:
    """Two servers, warmed up; gives what measures both, in turn."""
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        script = wrk_script(directory)
        OURS.ask("make", url := postgres.new_database())
        paused = {"WORKER_CONCURRENCY": "0"}
        ports = {
            "ours": stack.enter_context(server(directory, "-m", "app", QUEUE_URL=url, **paused)),
            "SQLite": stack.enter_context(server(directory, "-m", "app", **paused)),
        }

        def measure_both() -> Iterator[Figure]:
            for name, port in [*ports.items(), *ports.items()]:
                yield ACCEPTED, name, measure(port, script)

        list(measure_both())
        yield measure_both


def tasks(postgres: Postgres, queue: Queue) -> Iterator[Figure]:
    """Put tasks and drain them, for each concurrency."""
    for concurrency in (FEW, MANY):
        queue.ask("make", url := postgres.new_database())
        if queue.knows_batches:
            yield IN_BATCHES, queue.name, TASKS / queue.ask("put-batches", url, TASKS)
        else:
            queue.ask("put", url, TASKS)
        # As it would be in the midst of work: the planner knows the tables, and nothing is left
        # to be written of what was done before.
        postgres.sql("VACUUM ANALYZE", url)
        postgres.sql("CHECKPOINT", url)
        drained = TASKS / queue.ask("drain", url, TASKS, concurrency)
        if queue.name != PGQUEUER:
            yield f"drained, {concurrency} at once", queue.name, drained
        else:  # it runs at once whatever it has claimed, so the claim's size is all there is to set
            for of_ours in {concurrency, FEW}:
                yield f"drained, {of_ours} at once", f"{PGQUEUER}, claims of {concurrency}", drained
        postgres.sql(f"DROP DATABASE {url.rpartition('/')[2]} WITH (FORCE)")
    queue.ask("make", url := postgres.new_database())
    yield BY_CALLERS, queue.name, PUT_BY_CALLERS / queue.ask("put", url, PUT_BY_CALLERS)
    postgres.sql(f"DROP DATABASE {url.rpartition('/')[2]} WITH (FORCE)")


def collect(figures: dict[str, dict[str, list[float]]], more: Iterator[Figure]) -> None:
    """Add one round's figures; the mean, where something was measured more than once."""
    of_this_round: dict[tuple[str, str], list[float]] = defaultdict(list)
    for what, who, figure in more:
        of_this_round[what, who].append(figure)
    for (what, who), several in of_this_round.items():
        figures[what][who].append(statistics.mean(several))


def print_table(figures: dict[str, dict[str, list[float]]]) -> None:
    """Medians and their spread, and how many times as many ours are, round by round."""
    print(f"{'per second':<22} {'':<24} {'median':>7}  {'from':>7} {'to':>7}   ours ÷ it")
    for what, of in figures.items():
        for who, reached in sorted(of.items(), key=lambda item: item[0] != "ours"):
            line = f"{what:<22} {who:<24} {statistics.median(reached):>7.0f}  "
            line += f"{min(reached):>7.0f} {max(reached):>7.0f}"
            if who != "ours":
                ratios = [ours / its for ours, its in zip(of["ours"], reached, strict=True)]
                line += f"   {statistics.median(ratios):>5.2f}"
                line += f"  ({min(ratios):.2f} to {max(ratios):.2f})"
            print(line)


def processor() -> str:
    """What the cores are."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def progress(doing: str) -> None:
    """Show what is being measured, where somebody looks on."""
    if sys.stderr.isatty():
        print(f"\r{doing:<60}\r", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
