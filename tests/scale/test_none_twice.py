"""Four workers share the tasks of one PostgreSQL: none is run twice, and none is lost."""

import time
from pathlib import Path

from tests.scale.marks import leave_a_mark
from tests.scale.support import TASKS, UNFINISHED, Sql, put, runs, until, workers

WORKERS = 4


def test_none_is_run_twice_and_none_is_lost(tmp_path: Path, database_url: str, sql: Sql) -> None:
    """Counted outside the queue's own tables, by the marks that the tasks leave."""
    put_began = time.monotonic()
    ids = put(database_url, leave_a_mark, TASKS)
    began = time.monotonic()
    with workers(tmp_path, WORKERS, queue_url=database_url, quiet=True) as processes:
        until(lambda: sql(UNFINISHED) == "0", within=60 + TASKS / 50)
        ended = time.monotonic()
        assert [process.stop() for process in processes] == [0] * WORKERS

    done = runs(tmp_path)
    twice = sum(times - 1 for times in done.values())
    print(
        f"{TASKS} tasks put in {began - put_began:.1f} s, run in {ended - began:.1f} s "
        f"({TASKS / (ended - began):.0f} a second), {len(ids - set(done))} lost, {twice} twice"
    )
    assert set(done) == ids
    assert twice == 0
    assert sql("SELECT count(*) FROM afterward.tasks WHERE claims <> 1") == "0"
    assert workers_that_worked(tmp_path) == WORKERS


def test_workers_that_claim_nothing_run_some_twice(
    tmp_path: Path, database_url: str, sql: Sql
) -> None:
    """The negative control: if this finds none, the test above proves nothing."""
    ids = put(database_url, leave_a_mark, 300)
    with workers(tmp_path, WORKERS, queue_url=database_url, careless=True) as processes:
        assert [process.wait(60) for process in processes] == [0] * WORKERS

    done = runs(tmp_path)
    assert set(done) == ids
    assert max(done.values()) > 1


def workers_that_worked(directory: Path) -> int:
    """How many processes left marks."""
    return len({line.split()[1] for line in (directory / "marks").read_text().splitlines()})
