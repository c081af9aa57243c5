"""P8: the effect of a backlog on accepting requests, on claiming tasks, and on memory.

Four instances of the service run at the same time, each on a database with a different number of
waiting tasks. wrk sends P1's requests to them in turn. Then a worker's claims are timed on the same
databases.
"""

import asyncio
import sqlite3
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path

from afterward.engine import Engine
from afterward.engines import open_engine
from afterward.task import Outcome, Status
from benchmarks.harness import Result, Series, Spread, Target, compared, in_turn, progress
from benchmarks.load import Server, megabytes, server, wrk, wrk_script
from benchmarks.p4_drain import database_with_mails

BACKLOGS = (0, 10_000, 100_000, 1_000_000)
CLAIMS = 50  # in each round
AT_ONCE = 10  # tasks of each claim

Figures = dict[str, list[float]]


def measure(quick: bool) -> Iterator[Result | Series]:
    """Measure accepted requests, the memory after them, and claims."""
    rounds = 3 if quick else 9
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        paths = {backlog: database_with_backlog(directory, backlog) for backlog in BACKLOGS}
        rates, memory = _measure_accepting(directory, paths, rounds)
        seconds = _measure_claiming(
            paths, 4 * rounds
        )  # more rounds: claims are fast and differ little
    none, *more = map(_name, BACKLOGS)
    for waits in more:
        yield _compare_with_none(
            f"accepting while {waits}, against none", rates[waits], rates[none]
        )
    claims = {waits: [1 / each for each in several] for waits, several in seconds.items()}
    for waits in more:
        yield _compare_with_none(
            f"claiming while {waits}, against none", claims[waits], claims[none], "claims"
        )
    yield Result(
        "P8",
        f"memory after the same load while {more[-1]}, beyond that while none does",
        Spread.of([a - b for a, b in zip(memory[more[-1]], memory[none], strict=True)]),
        unit="MB",
        target=Target("≤", 30),
        ours=Spread.of(memory[more[-1]]),
        theirs=Spread.of(memory[none]),
        figures_unit="MB",
    )
    milliseconds = {name: [1000 * each for each in several] for name, several in seconds.items()}
    yield _series("Accepting while tasks wait", "requests/s", rates)
    yield _series(f"A claim of {AT_ONCE} while tasks wait", "ms", milliseconds)
    yield _series("Memory while tasks wait", "MB", memory)


def database_with_backlog(directory: Path, backlog: int) -> Path:
    """Create a database with `backlog` queued tasks."""
    progress(f"putting {backlog:,} tasks")
    path = database_with_mails(directory, 1).rename(directory / f"{backlog}.db")
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("PRAGMA synchronous = OFF")
        multiply(connection, backlog)
    return path


def multiply(connection: sqlite3.Connection, number: int) -> None:
    """Replace the only task by `number` copies with different ids.

    The ids are UUIDv7 like real ids, with timestamps a millisecond apart.
    """
    connection.row_factory = sqlite3.Row
    task = dict(connection.execute("SELECT * FROM tasks").fetchone())
    connection.execute("DELETE FROM tasks")
    # `table_info` omits generated columns, and those cannot be inserted.
    names = [name for (name,) in connection.execute("SELECT name FROM pragma_table_info('tasks')")]
    others = [name for name in names if name not in {"seq", "id"}]
    connection.execute(
        f"""
        INSERT INTO tasks (id, {", ".join(others)})
        WITH RECURSIVE moments(at) AS (
            SELECT :first UNION ALL SELECT at + 1 FROM moments WHERE at < :first + :number - 1
        )
        SELECT printf(
            '%08x-%04x-7%03x-%04x-%012x', at >> 16, at & 0xffff, random() & 0xfff,
            0x8000 | (random() & 0x3fff), random() & 0xffffffffffff
        ), {", ".join(f":{column}" for column in others)}
        FROM moments WHERE :number > 0
        """,
        task | {"number": number, "first": int(time.time() * 1000) - number},
    )


# Accepting requests


def _measure_accepting(
    directory: Path, paths: dict[int, Path], rounds: int
) -> tuple[Figures, Figures]:
    """Return the requests/s of each instance, and its memory in megabytes after each round."""
    script = wrk_script(directory)
    with ExitStack() as stack:

        def accept(backlog: int, running: Server) -> tuple[float, float]:
            rate = wrk(running.port, script).rate
            _delete_beyond(paths[backlog], backlog)
            return rate, megabytes(running)

        contestants = {}
        for backlog, path in paths.items():
            running = stack.enter_context(
                server(
                    directory,
                    *("-m", "app"),
                    QUEUE_URL=f"sqlite:///{path}",
                    WORKER_CONCURRENCY="0",
                    MAX_BACKLOG=str(10 * BACKLOGS[-1]),
                )
            )
            contestants[_name(backlog)] = partial(accept, backlog, running)
        in_turn(1, contestants)  # to warm up
        turns = in_turn(rounds, contestants)
    rates = {name: [rate for rate, _ in several] for name, several in turns.items()}
    memory = {name: [megabytes for _, megabytes in several] for name, several in turns.items()}
    return rates, memory


def _delete_beyond(path: Path, backlog: int) -> None:
    """Delete the tasks accepted in this round, to restore the backlog. No process writes now."""
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("DELETE FROM tasks WHERE seq > ?", (backlog,))


# Claiming tasks


def _measure_claiming(paths: dict[int, Path], rounds: int) -> Figures:
    """Return the seconds of a claim on each database, as the median of many claims."""
    with asyncio.Runner() as runner, ExitStack() as stack:

        def claim(engine: Engine) -> float:
            return runner.run(_claim(engine))

        def stop(engine: Engine) -> None:
            runner.run(engine.stop())

        contestants = {}
        for backlog, path in paths.items():
            # A claim needs tasks, so the empty backlog gets as many as a claim takes.
            crowded = path if backlog else database_with_backlog(path.parent, AT_ONCE)
            engine = open_engine(f"sqlite:///{crowded}")
            runner.run(engine.start())
            stack.callback(stop, engine)
            contestants[_name(backlog)] = partial(claim, engine)
        return in_turn(rounds, contestants)


async def _claim(engine: Engine) -> float:
    """Claim tasks, and give them back behind all others; return the median seconds of a claim."""
    seconds = []
    for _ in range(CLAIMS):
        began = time.perf_counter()
        claim = await engine.claim(
            "worker", kinds=["send_email"], limit=AT_ONCE, now=time.time(), lease=30
        )
        seconds.append(time.perf_counter() - began)
        tasks = claim.running
        assert len(tasks) == AT_ONCE, len(tasks)
        now = time.time()
        given_back = Outcome(Status.QUEUED, due_at=now, counts=False)
        await asyncio.gather(*(engine.settle(task, given_back, now) for task in tasks))
    return statistics.median(seconds)


# The results


def _name(backlog: int) -> str:
    return f"{backlog:,} wait"


def _compare_with_none(
    what: str, ours: list[float], theirs: list[float], of_what: str = "requests"
) -> Result:
    return compared("P8", what, ours, theirs, target=Target("≥", 0.95), unit=f"{of_what}/s")


def _series(chart: str, unit: str, figures: Figures) -> Series:
    medians = tuple(map(statistics.median, figures.values()))
    return Series(chart, "ours", tuple(map(float, BACKLOGS)), medians, "waiting tasks", unit)
