"""A worker dies with its tasks in hand: the others do them."""

from pathlib import Path

from tests.scale.marks import die, leave_a_mark
from tests.scale.support import LEASE, UNFINISHED, Sql, put, runs, until, workers

HELD = "SELECT count(*) FROM afterward.tasks WHERE status = 'running' AND owner LIKE '%:{}:%'"


def test_kill_9_of_a_worker_leaves_its_tasks_to_the_others(
    tmp_path: Path, database_url: str, sql: Sql
) -> None:
    """Those that it held are begun anew, once each; the crash is counted."""
    ids = put(database_url, leave_a_mark, 120, seconds=0.5)
    with workers(tmp_path, 4, queue_url=database_url, lease_seconds=LEASE) as (victim, *others):
        held = HELD.format(victim.pid)
        until(lambda: sql(held) == "10", within=20)
        victim.kill()
        left = int(sql(held))
        took = until(lambda: sql(UNFINISHED) == "0", within=60)
        assert [other.stop() for other in others] == [0, 0, 0]

    print(f"lease {LEASE:g} s: {left} tasks held, all done {took:.1f} s after the kill")
    done = runs(tmp_path)
    assert set(done) == ids
    assert sum(done.values()) - len(ids) <= left
    assert left > 0
    assert sql("SELECT crashes, count(*) FROM afterward.tasks GROUP BY crashes ORDER BY 1") == (
        f"0|{len(ids) - left}\n1|{left}"
    )
    assert sum(other.log.count('"task recovered"') for other in others) == left


def test_a_task_that_kills_its_worker_is_given_up_and_all_others_succeed(
    tmp_path: Path, database_url: str, sql: Sql
) -> None:
    """It has three workers on its conscience; what ran beside it is not to blame."""
    put(database_url, die, 1)
    ids = put(database_url, leave_a_mark, 40, seconds=0.2)
    with workers(tmp_path, 4, queue_url=database_url, lease_seconds=1):
        until(lambda: sql(UNFINISHED) == "0", within=60)

    assert sql("SELECT kind, crashes FROM afterward.tasks WHERE status = 'failed'") == "die|3"
    assert set(runs(tmp_path)) == ids
