"""A task kills its worker process with SIGKILL, and a supervisor restarts the process.

After the third crash the task is `failed`. All other tasks succeed, also the tasks that ran beside
it.
"""

from collections.abc import Callable
from pathlib import Path

import pytest

from afterward.engine import Engine
from afterward.retry import MAX_CRASHES
from afterward.task import Status
from tests.library.support import LEASE, NOW, a_task, claim_all, claim_one, recover
from tests.library.support import put as put_task
from tests.support.marks import die, leave_a_mark
from tests.support.service import Process
from tests.support.service import until as wait_until
from tests.support.torture import Tried, form
from tests.support.workers import put, read, runs, workers

OTHERS = form(12, 1_000)


def test_a_deadly_task_fails_after_three_crashes_and_all_others_succeed(
    tmp_path: Path, queue_url: str, tried: Tried
) -> None:
    """SQLite has one worker process. On PostgreSQL three of them run, and crash in turn."""
    (deadly,) = put(queue_url, die, 1)
    others = put(queue_url, leave_a_mark, OTHERS, seconds=0.1)
    processes = 1 if queue_url.startswith("sqlite:") else 3
    settings = {"queue_url": queue_url, "lease_seconds": 1, "worker_concurrency": form(4, 10)}
    with workers(tmp_path, processes, **settings) as at_work:
        deaths = supervise(
            at_work, until=lambda: given_up(at_work) and set(runs(tmp_path)) == others
        )

    task = read(queue_url, deadly)
    engine = queue_url.partition(":")[0]
    tried(
        f"{engine}: a deadly task beside {OTHERS:,} others",
        f"{deaths} processes died, then it was {task.status}; {OTHERS:,} others succeeded",
    )
    assert (task.status, task.crashes, deaths) == (Status.FAILED, MAX_CRASHES, MAX_CRASHES)
    assert "WorkerDied" in str(task.error)


@pytest.mark.anyio
async def test_a_task_that_crashed_three_times_fails_although_it_has_attempts_left(
    engine: Engine,
) -> None:
    await put_task(engine, a_task(max_attempts=100))
    statuses = []
    for crash in range(1, MAX_CRASHES + 1):
        now = NOW + crash * LEASE
        await claim_one(engine, f"worker-{crash}", now=now - LEASE)
        (recovered,) = await recover(engine, "worker-0", now=now)
        statuses.append(recovered.status)
    assert statuses == [Status.RETRYING, Status.RETRYING, Status.FAILED]
    assert recovered.finished_at == now
    assert await claim_all(engine, now=now) == []


def supervise(workers: list[Process], *, until: Callable[[], object]) -> int:
    """Restart each worker that dies, until a condition holds; return the number of deaths."""
    deaths = 0

    def done() -> bool:
        nonlocal deaths
        for worker in workers:
            if worker.ended:
                deaths += 1
                worker.start()
        return bool(until())

    wait_until(done, within=60)
    return deaths


def given_up(workers: list[Process]) -> bool:
    return any('"task failed"' in worker.log for worker in workers)


def test_control_without_the_crash_limit_a_deadly_task_is_never_given_up(
    tmp_path: Path, sqlite_url: str, tried: Tried
) -> None:
    """Two more processes die than the limit allows, and the task would run again."""
    (deadly,) = put(sqlite_url, die, 1)
    with workers(tmp_path, 1, queue_url=sqlite_url, without="crash-cap") as (worker,):
        for _ in range(MAX_CRASHES + 1):
            worker.wait()
            worker.start()
        worker.wait()
    deaths = read(sqlite_url, deadly).attempts
    tried("without the crash limit", f"{deaths} processes died, and it was not given up")
    assert deaths == MAX_CRASHES + 2


def test_control_without_suspicion_tasks_beside_a_deadly_task_fail_too(
    tmp_path: Path, sqlite_url: str, tried: Tried
) -> None:
    """Tasks that crashed together run together again, so harmless tasks crash each time too."""
    harmless = put(sqlite_url, leave_a_mark, 5, seconds=0.1)
    put(sqlite_url, die, 1)
    with workers(tmp_path, 1, queue_url=sqlite_url, without="suspicion") as (worker,):
        supervise([worker], until=lambda: given_up([worker]))
    failed = [task_id for task_id in harmless if read(sqlite_url, task_id).status is Status.FAILED]
    tried("without suspicion: 5 tasks beside it", f"{len(failed)} failed with it")
    assert failed
