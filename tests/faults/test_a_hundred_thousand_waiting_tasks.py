"""100,000 tasks wait: for a later attempt, or all due at the same time.

A new mail overtakes the tasks that are due later. It waits only for tasks that were due before it,
even if those fail again and again. A claim costs as much as with 100 waiting tasks. The first claim
comes within a second of the start, although the start checks the whole file.
"""

import shutil
import sqlite3
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from afterward.engine import Engine
from afterward.engines import open_engine
from afterward.engines.postgres.engine import Postgres as PostgreSQL
from afterward.engines.postgres.schema import migrate
from afterward.engines.sqlite.database_file import open_database
from afterward.engines.sqlite.engine import SQLite
from afterward.events import EventType
from afterward.task import Outcome, Status
from afterward.unit_of_work import Context
from tests.library.support import (
    DAY,
    KINDS,
    LEASE,
    NOW,
    EventRecorder,
    a_task,
    claim,
    claim_one,
    opened,
    put,
    queue_of,
    working,
)
from tests.support.postgres import Postgres
from tests.support.service import PATIENCE
from tests.support.torture import Tried, form

pytestmark = pytest.mark.anyio

WAITING = 100_000
LATER = NOW + 1000
AT_ONCE = 10  # tasks of each claim
FEW = 100
TIMES = FEW // AT_ONCE - 1


def with_waiting(path: Path, count: int) -> Path:
    """Create a database with `count` tasks that wait for a second attempt at the time LATER."""
    with closing(open_database(path)) as connection:
        connection.execute(
            f"""
            INSERT INTO tasks
                (id, kind, arguments, status, attempts, max_attempts,
                 created_at, updated_at, due_at)
            WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {count})
            SELECT printf('%08x-0000-7000-8000-000000000000', i), 'greet',
                   '{{"args":[],"kwargs":{{}}}}', 'retrying', 1, 8, {NOW}, {NOW}, {LATER} FROM n
            """
        )
    return path


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The original of `crowded`. It takes a second to make, so each test gets a copy."""
    return with_waiting(tmp_path_factory.mktemp("template") / "queue.db", WAITING)


@pytest.fixture
def crowded(template: Path, tmp_path: Path) -> Path:
    """A database with 100,000 tasks that wait until LATER."""
    return Path(shutil.copy(template, tmp_path / "crowded.db"))


# The order of the tasks


async def test_tasks_that_are_due_later_do_not_delay_a_new_mail(crowded: Path) -> None:
    async with opened(crowded) as engine:
        await put(engine, mail := a_task())
        assert (await claim_one(engine)).id == mail.id


OLD = form(100, 500)


async def test_tasks_that_fail_again_and_again_do_not_starve_a_new_mail(
    engine: Engine, tried: Tried
) -> None:
    """The mail is claimed after one attempt of each task that was due before it."""
    claims = await claims_until_a_mail_is_reached(engine)
    name = "SQLite" if isinstance(engine, SQLite) else "PostgreSQL"
    tried(
        f"{name}: {OLD} tasks are due again as soon as they fail",
        f"a new mail is in claim {claims} of {AT_ONCE} each",
    )
    assert claims <= OLD / AT_ONCE + 1


async def test_control_a_claim_of_the_oldest_tasks_first_starves_a_new_mail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tried: Tried
) -> None:
    """Simple queues order by the time of acceptance, so old tasks that fail always come first."""

    class OldestFirst(sqlite3.Connection):
        def execute(self, sql: str, *values: Any) -> sqlite3.Cursor:
            return super().execute(sql.replace("ORDER BY due_at, seq", "ORDER BY seq"), *values)

    monkeypatch.setattr(sqlite3, "connect", partial(sqlite3.connect, factory=OldestFirst))
    async with opened(tmp_path / "queue.db") as engine:
        claims = await claims_until_a_mail_is_reached(engine, at_most=3 * OLD // AT_ONCE)
    tried(f"oldest first, {OLD} tasks fail over and over", f"no new mail in {claims} claims")
    assert claims == 3 * OLD // AT_ONCE


async def claims_until_a_mail_is_reached(engine: Engine, at_most: int = 1_000) -> int:
    """Let tasks fail and be due again at once. Return how many claims it takes to reach a mail."""
    now = NOW
    await put(engine, *(a_task(at=now) for _ in range(OLD)))
    await put(engine, mail := a_task(at=now + 1))
    for claims in range(1, at_most):
        now += 2  # more than a second, the precision of PostgreSQL's engine
        tasks = (await claim(engine, limit=AT_ONCE, now=now)).running
        if mail.id in {task.id for task in tasks}:
            return claims
        for task in tasks:
            await engine.settle(task, Outcome(Status.RETRYING, due_at=now), now)
    return at_most


# The cost of a claim


async def test_a_claim_costs_no_more_than_with_a_hundred_waiting(
    crowded: Path, tmp_path: Path, tried: Tried
) -> None:
    """Counted in instructions of SQLite's virtual machine, for waiting tasks due now and later."""
    few, _ = await cost_on_sqlite(with_waiting(tmp_path / "few.db", FEW), now=LATER)
    none_due, _ = await cost_on_sqlite(crowded, now=NOW)
    left_out, _ = await cost_on_sqlite(crowded, now=LATER, kinds=("send_email", "save_data"))
    due, seconds = await cost_on_sqlite(crowded, now=LATER)
    tried(
        f"SQLite: a claim of {AT_ONCE} tasks, {WAITING:,} waiting instead of {FEW}",
        f"{due} steps instead of {few}, {seconds * 1000:.2f} ms (median); "
        f"{none_due} steps to find that none is due, {left_out} if they are of another kind",
    )
    assert due < 1.5 * few
    assert max(none_due, left_out) < few
    assert seconds < form(0.1, 0.001)


async def test_control_without_its_index_a_claim_reads_every_waiting_task(
    crowded: Path, tmp_path: Path, tried: Tried
) -> None:
    """An index of the same name on another column replaces it, so the statement still runs."""
    for path in (crowded, few := with_waiting(tmp_path / "few.db", FEW)):
        with closing(sqlite3.connect(path, isolation_level=None)) as connection:
            connection.executescript(
                """
                DROP INDEX tasks_due;
                CREATE INDEX tasks_due ON tasks (seq) WHERE status IN ('queued', 'retrying');
                """
            )
    expected, _ = await cost_on_sqlite(few, now=LATER)
    steps, seconds = await cost_on_sqlite(crowded, now=LATER)
    tried(
        f"SQLite without the index, {WAITING:,} waiting",
        f"{steps} steps instead of {expected}, {seconds * 1000:.0f} ms",
    )
    assert steps > 100 * expected
    assert seconds > 0.001


async def cost_on_sqlite(
    path: Path, *, now: float, kinds: Sequence[str] = KINDS
) -> tuple[int, float]:
    """Return the steps of a claim (SQLite's instructions), and the median of its seconds.

    The seconds cover the statements, without the wait for the disk.
    """
    steps = 0
    seconds = list[float]()

    def step() -> int:
        nonlocal steps
        steps += 1
        return 0

    async with opened(path) as engine:
        run = engine._commits.run

        async def timed(operation: Callable[[sqlite3.Connection], Any]) -> Any:
            def measured(connection: sqlite3.Connection) -> Any:
                began = time.perf_counter()
                result = operation(connection)
                seconds.append(time.perf_counter() - began)
                return result

            return await run(measured)

        claim = partial(engine.claim, "worker-1", kinds=kinds, limit=AT_ONCE, now=now, lease=LEASE)
        await run(lambda connection: connection.set_progress_handler(step, 1))
        await claim()
        await run(lambda connection: connection.set_progress_handler(None, 1))
        engine._commits.run = timed  # type: ignore[method-assign]
        for _ in range(TIMES):
            await claim()
    return steps, statistics.median(seconds)


BLOCKS = """
    SELECT sum(heap_blks_hit + heap_blks_read + coalesce(idx_blks_hit + idx_blks_read, 0))
    FROM pg_statio_all_tables WHERE schemaname = 'afterward'
"""
INDEXES = ("tasks_ready",)


@pytest.mark.long_form
async def test_a_claim_on_postgresql_costs_no_more_than_with_a_hundred_waiting(
    database_url: str, tried: Tried
) -> None:
    """Counted in blocks read. A larger index may have one more level, which costs a block more."""
    await assert_claims_on_postgresql_are_cheap(database_url, tried)


@pytest.mark.long_form
async def test_control_without_its_indexes_postgresql_reads_every_waiting_task(
    postgres: Postgres, tried: Tried
) -> None:
    url = postgres.new_database()  # no other test needs the indexes of this one
    await migrate(url)

    def drop_indexes() -> None:
        postgres.sql("; ".join(f"DROP INDEX afterward.{name}" for name in INDEXES), url)

    with pytest.raises(AssertionError, match="blocks"):
        await assert_claims_on_postgresql_are_cheap(url, tried, "without indexes", drop_indexes)


async def assert_claims_on_postgresql_are_cheap(
    url: str, tried: Tried, how: str = "as it is", then: Callable[[], None] = lambda: None
) -> None:
    now = time.time()
    engine = open_engine(url)
    assert isinstance(engine, PostgreSQL)
    await engine.start()
    then()
    await put(engine, *(a_task(at=now) for _ in range(FEW)))
    few, _ = await cost_on_postgresql(engine, now)
    for _ in range(WAITING // 1000):
        await put(engine, *(a_task(at=now, due_at=now + DAY) for _ in range(1000)))
    many, seconds = await cost_on_postgresql(engine, now)
    await engine.stop()
    tried(
        f"PostgreSQL {how}: a claim of {AT_ONCE} tasks, {WAITING:,} waiting for later",
        f"{many} blocks instead of {few}, {seconds * 1000:.1f} ms",
    )
    assert many < 3 * few, "it reads too many blocks"


async def cost_on_postgresql(engine: PostgreSQL, now: float) -> tuple[int, float]:
    """Return the blocks that a claim reads and its seconds: the cheapest of three claims."""

    async def blocks() -> int:
        async with engine._pool.session() as session:
            await session.execute("SELECT pg_stat_force_next_flush()")
        async with engine._pool.session() as session:
            return int(await session.fetchval(BLOCKS))

    costs = []
    for _ in range(3):
        before, began = await blocks(), time.perf_counter()
        claimed = await engine.claim("worker-1", kinds=KINDS, limit=AT_ONCE, now=now, lease=DAY)
        seconds = time.perf_counter() - began
        costs.append((await blocks() - before, seconds))
        assert len(claimed.running) == AT_ONCE
    return min(costs)


# The time from the start to the first claim


async def test_the_first_claim_comes_within_a_second_of_the_start(
    crowded: Path, tried: Tried
) -> None:
    async def greet(context: Context[None]) -> None:
        pass

    began = time.monotonic()
    async with opened(crowded) as engine:
        started = time.monotonic()
        queue = queue_of(engine, greet, now=lambda: LATER)
        recorder = EventRecorder(queue)
        async with working(queue):
            await recorder.until(EventType.STARTED)
            claimed = time.monotonic()
    tried(
        f"a start with {WAITING:,} tasks due",
        f"first claim after {claimed - began:.2f} s, {started - began:.2f} s of it the check",
    )
    assert claimed - began < form(PATIENCE, 1)
