"""A worker returns after its lease expired, and writes the outcome of its attempt: no row changes.

Each claim of a task has a number, the fencing token. Only the worker with the latest number can
write an outcome.
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
from afterward.filter import TaskFilter
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


async def is_requeued(engine: Engine, task_id: str) -> None:
    """The lease has expired, so another worker re-queues the task."""
    (task,) = await recover(engine, "another", now=LATER)
    assert (task.id, task.status) == (task_id, Status.RETRYING)


async def is_run_by_another_worker(engine: Engine, task_id: str) -> None:
    await is_requeued(engine, task_id)
    await claim_one(engine, "another", now=LATER)


async def was_done_by_another_worker(engine: Engine, task_id: str) -> None:
    await is_run_by_another_worker(engine, task_id)
    await engine.settle(await engine.get(task_id), Outcome(Status.SUCCEEDED), LATER)


async def was_cancelled(engine: Engine, task_id: str) -> None:
    await is_requeued(engine, task_id)
    await engine.cancel(task_id, LATER)


async def was_cancelled_and_queued_anew(engine: Engine, task_id: str) -> None:
    """A client cancelled the task and retried it, so its attempts are counted from the start."""
    await was_cancelled(engine, task_id)
    await retry(engine, task_id, LATER, Writes())
    await claim_one(engine, "another", now=LATER)


MEANWHILE = [
    is_run_by_another_worker,
    was_done_by_another_worker,
    was_cancelled,
    was_cancelled_and_queued_anew,
    is_requeued,
]


@pytest.mark.anyio
async def test_a_stale_worker_cannot_change_any_row(engine: Engine, tried: Tried) -> None:
    """This holds in every later state of the task, also for follow-up tasks and records."""
    follow_ups = Writes((a_task(),), (Record("uploads", "", "1", {}, NOW),))
    outcomes = [*OUTCOMES, Outcome(Status.SUCCEEDED, follow_ups=follow_ups)]
    changed = 0
    for change in MEANWHILE:
        await put(engine, a_task())
        stale = await claim_one(engine)
        await change(engine, stale.id)
        before = await all_tasks(engine)
        for outcome in outcomes:
            assert await engine.settle(stale, outcome, LATE) is None
        assert await engine.report(stale, 0.5, LATE) is None
        changed += len(set(await all_tasks(engine)) ^ set(before))

    tried(
        f"{len(MEANWHILE) * (len(outcomes) + 1)} late outcomes and reports",
        f"{changed} rows changed",
    )
    assert changed == 0
    assert await engine.list_records("uploads", client="", after=None, limit=10) == []


async def all_tasks(engine: Engine) -> list[Task]:
    return await engine.list_tasks(TaskFilter(), limit=10)


@pytest.mark.anyio
async def test_control_without_the_token_the_row_changes(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, tried: Tried
) -> None:
    """The engines' own statements, without the comparison of the claim's number."""
    await put(engine, a_task())
    stale = await claim_one(engine)
    await is_run_by_another_worker(engine, stale.id)
    remove_the_fencing_token(monkeypatch)
    settled = await engine.settle(stale, OUTCOMES[0], LATE)
    tried("without the token: 1 late success", f"{int(settled is not None)} row changed")
    assert (await engine.get(stale.id)).result == '"late"'


def remove_the_fencing_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove the comparison of the fencing token from both engines' statements."""
    run_merged = GroupCommit.run_merged

    async def run_without(commits: GroupCommit, do: Callable[[Any, Any], Any], item: Any) -> Any:
        return await run_merged(commits, lambda db, items: do(WithoutToken(db), items), item)

    async def end_without(session: Any, settlements: Any) -> Any:
        return await end_attempts(WithoutToken(session), settlements)  # type: ignore[arg-type]

    monkeypatch.setattr(GroupCommit, "run_merged", run_without)
    monkeypatch.setattr(postgres_statements, "end_attempts", end_without)


class WithoutToken:
    """Wraps a connection to either database, and changes its statements."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection

    def execute(self, statement: str, *values: Any) -> Any:
        """Run a statement on SQLite."""
        statement = statement.replace("AND tasks.claims = ended.claims", "")
        return self._connection.execute(statement, *values)

    def fetch(self, statement: str, *values: Any) -> Any:
        """Run a statement on PostgreSQL."""
        statement = statement.replace("AND tasks.claims = held.claims", "")
        return self._connection.fetch(statement, *values)


def test_the_outcomes_of_a_suspended_worker_are_rejected(
    tmp_path: Path, database_url: str, sql: Sql, tried: Tried
) -> None:
    """SIGSTOP and SIGCONT act like the suspend and resume of the worker's machine."""
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
