"""A worker that was taken for dead comes back, and says how its attempt ended: no row changes.

Each claim of a task has a number, the fencing token, and only the latest one may settle.
"""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from afterward.engine import Engine
from afterward.engines.postgres import statements as postgres_statements
from afterward.engines.postgres.statements import end_attempts
from afterward.engines.sqlite.group_commit import GroupCommit
from afterward.task import Outcome, Record, Status, Task, Writes
from tests.library.support import LEASE, NOW, a_task, claim_one, put, recover, retry
from tests.support.marks import leave_a_mark
from tests.support.postgres import Sql
from tests.support.service import PATIENCE, until
from tests.support.torture import Tried
from tests.support.workers import UNFINISHED, workers
from tests.support.workers import put as put_marks

LATER = NOW + LEASE
LATE = LATER + 1
OUTCOMES = [
    Outcome(Status.SUCCEEDED, result='"late"'),
    Outcome(Status.FAILED, error='"late"'),
    Outcome(Status.RETRYING, due_at=LATE, error='"late"'),
    Outcome(Status.QUEUED, due_at=LATE, counts=False),
]


async def waits_again(engine: Engine, task_id: str) -> None:
    """The others notice that its worker is silent."""
    (task,) = await recover(engine, "another", now=LATER)
    assert (task.id, task.status) == (task_id, Status.RETRYING)


async def runs_elsewhere(engine: Engine, task_id: str) -> None:
    await waits_again(engine, task_id)
    await claim_one(engine, "another", now=LATER)


async def was_done_elsewhere(engine: Engine, task_id: str) -> None:
    await runs_elsewhere(engine, task_id)
    await engine.settle(await engine.get(task_id), Outcome(Status.SUCCEEDED), LATER)


async def was_cancelled(engine: Engine, task_id: str) -> None:
    await waits_again(engine, task_id)
    await engine.cancel(task_id, LATER)


async def runs_afresh(engine: Engine, task_id: str) -> None:
    """Somebody cancelled it and queued it anew: its attempts are counted from the start."""
    await was_cancelled(engine, task_id)
    await retry(engine, task_id, LATER, Writes())
    await claim_one(engine, "another", now=LATER)


MEANWHILE = [runs_elsewhere, was_done_elsewhere, was_cancelled, runs_afresh, waits_again]


@pytest.mark.anyio
async def test_what_it_says_changes_nothing(engine: Engine, tried: Tried) -> None:
    """Whatever became of the task; its follow-ups and records are not written either."""
    follow_ups = Writes((a_task(),), (Record("uploads", "", "1", {}, NOW),))
    outcomes = [*OUTCOMES, Outcome(Status.SUCCEEDED, follow_ups=follow_ups)]
    changed = 0
    for something_happens in MEANWHILE:
        await put(engine, a_task())
        stale = await claim_one(engine)
        await something_happens(engine, stale.id)
        before = await all_tasks(engine)
        for outcome in outcomes:
            assert await engine.settle(stale, outcome, LATE) is None
        assert await engine.report(stale, 0.5, LATE) is None
        changed += len(set(await all_tasks(engine)) ^ set(before))

    tried(f"{len(MEANWHILE) * (len(outcomes) + 1)} late words", f"{changed} rows changed")
    assert changed == 0
    assert await engine.list_records("uploads", client="", after=None, limit=10) == []


async def all_tasks(engine: Engine) -> list[Task]:
    return await engine.list_tasks(client="", status=None, kind=None, after=None, limit=10)


@pytest.mark.anyio
async def test_control_without_the_token_the_row_changes(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, tried: Tried
) -> None:
    """Our own statements, but that they do not compare the claim's number."""
    await put(engine, a_task())
    stale = await claim_one(engine)
    await runs_elsewhere(engine, stale.id)
    compare_no_claims(monkeypatch)
    settled = await engine.settle(stale, OUTCOMES[0], LATE)
    tried("without the token: 1 late success", f"{int(settled is not None)} row changed")
    assert (await engine.get(stale.id)).result == '"late"'


def compare_no_claims(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the fencing token out of what both engines say to their databases."""
    run_merged = GroupCommit.run_merged

    async def run_without(commits: GroupCommit, do: Callable[[Any, Any], Any], item: Any) -> Any:
        return await run_merged(commits, lambda db, items: do(WithoutToken(db), items), item)

    async def end_without(session: Any, settlements: Any) -> Any:
        return await end_attempts(WithoutToken(session), settlements)  # type: ignore[arg-type]

    monkeypatch.setattr(GroupCommit, "run_merged", run_without)
    monkeypatch.setattr(postgres_statements, "end_attempts", end_without)


class WithoutToken:
    """A connection to either database."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection

    def execute(self, statement: str, *values: Any) -> Any:
        """What SQLite is asked with."""
        statement = statement.replace("AND tasks.claims = ended.claims", "")
        return self._connection.execute(statement, *values)

    def fetch(self, statement: str, *values: Any) -> Any:
        """What PostgreSQL is asked with."""
        statement = statement.replace("AND tasks.claims = held.claims", "")
        return self._connection.fetch(statement, *values)


def test_a_worker_that_stood_still_is_turned_down(
    tmp_path: Path, database_url: str, sql: Sql, tried: Tried
) -> None:
    """A whole process, as on a machine that was suspended: it goes on where it stopped."""
    put_marks(database_url, leave_a_mark, 1, seconds=0.5)
    with workers(tmp_path, 1, queue_url=database_url, lease_seconds=1) as (suspended,):
        until(lambda: sql("SELECT status FROM afterward.tasks") == "running", within=PATIENCE)
        os.kill(suspended.pid, signal.SIGSTOP)
        (tmp_path / "other").mkdir()
        with workers(tmp_path / "other", 1, queue_url=database_url, lease_seconds=1):
            until(lambda: sql(UNFINISHED) == "0", within=60)
        facts = sql("SELECT * FROM afterward.tasks")
        os.kill(suspended.pid, signal.SIGCONT)
        until(lambda: '"task lost"' in suspended.log, within=PATIENCE)
        assert '"task succeeded"' not in suspended.log
    unchanged = sql("SELECT * FROM afterward.tasks") == facts
    tried("a worker suspended for longer than its lease", f"row unchanged: {unchanged}")
    assert unchanged
