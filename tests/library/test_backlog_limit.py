"""The limit on the backlog: one process never exceeds it, and refuses no task that fits."""

import asyncio
from random import Random

import pytest

from afterward import backlog_limit as limit_module
from afterward.backlog_limit import BacklogLimit
from afterward.errors import BacklogFull, QueueUnavailable
from afterward.task import Backlog, Status

pytestmark = pytest.mark.anyio


class Tasks:
    """Stands for the database: to count its tasks and to add some takes a few loop iterations."""

    def __init__(self, unfinished: int = 0) -> None:
        self.unfinished = self.most = unfinished
        self.finished = 0
        self.counted = 0
        self.failing = False

    async def count(self) -> Backlog:
        """Count the tasks at some moment during this call."""
        self.counted += 1
        await asyncio.sleep(0)
        if self.failing:
            raise QueueUnavailable
        counts = {Status.QUEUED: self.unfinished, Status.SUCCEEDED: self.finished}
        await asyncio.sleep(0)
        return Backlog(counts, None)

    async def put(self, tasks: int = 1) -> None:
        """Commit so many new tasks."""
        await asyncio.sleep(0)
        self.unfinished += tasks
        self.most = max(self.most, self.unfinished)
        await asyncio.sleep(0)

    def finish(self, tasks: int) -> None:
        """Finish so many tasks."""
        self.unfinished -= tasks
        self.finished += tasks


@pytest.fixture(params=[0.0, 3600.0], ids=["counted always", "counted when needed"])
def counted_for(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limit_module, "COUNT_CACHED_SECONDS", request.param)


async def put(limit: BacklogLimit, tasks: Tasks, number: int = 1) -> bool:
    """Commit so many tasks if the limit admits them; return whether it did."""
    try:
        await limit.reserve(number)
    except BacklogFull:
        return False
    await tasks.put(number)
    limit.release(number)
    return True


async def test_tasks_are_admitted_up_to_the_limit_and_no_further() -> None:
    tasks = Tasks(unfinished=7)
    limit = BacklogLimit(tasks.count, 10)
    assert [await put(limit, tasks) for _ in range(5)] == [True] * 3 + [False] * 2
    assert tasks.unfinished == 10


async def test_tasks_of_one_commit_are_admitted_together_or_not_at_all() -> None:
    tasks = Tasks()
    limit = BacklogLimit(tasks.count, 10)
    assert await put(limit, tasks, 8)
    assert not await put(limit, tasks, 3)
    assert await put(limit, tasks, 2)


async def test_a_commit_without_tasks_is_admitted_when_the_backlog_is_full() -> None:
    tasks = Tasks(unfinished=20)
    limit = BacklogLimit(tasks.count, 10)
    assert await put(limit, tasks, 0)
    assert not await put(limit, tasks)


async def test_a_finished_task_makes_room_at_once() -> None:
    tasks = Tasks(unfinished=10)
    limit = BacklogLimit(tasks.count, 10)
    assert not await put(limit, tasks)
    tasks.finish(1)
    assert await put(limit, tasks)
    assert not await put(limit, tasks)


async def test_room_reserved_for_a_commit_that_failed_is_given_back() -> None:
    tasks = Tasks(unfinished=9)
    limit = BacklogLimit(tasks.count, 10)
    await limit.reserve(1)
    limit.release(1)  # it was not
    assert await put(limit, tasks)


async def test_the_backlog_is_not_counted_for_every_request() -> None:
    tasks = Tasks()
    limit = BacklogLimit(tasks.count, 1000)
    for _ in range(500):
        assert await put(limit, tasks)
    assert tasks.counted <= 2


async def test_tasks_of_other_processes_are_noticed_once_the_count_is_old(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tasks = Tasks()
    limit = BacklogLimit(tasks.count, 10)
    assert await put(limit, tasks)
    tasks.unfinished = 10
    monkeypatch.setattr(limit_module, "COUNT_CACHED_SECONDS", 0.0)
    assert not await put(limit, tasks)


async def test_no_task_is_admitted_before_the_first_count() -> None:
    """Otherwise the first requests after a start would take a full backlog for an empty one."""
    tasks = Tasks(unfinished=10)
    limit = BacklogLimit(tasks.count, 10)
    assert not any(await asyncio.gather(*(put(limit, tasks) for _ in range(20))))
    assert tasks.counted <= 2  # all 20 wait for the same count


async def test_a_count_that_fails_is_not_repeated_for_each_waiting_request() -> None:
    """The waiting requests go on: if the database is away, their commit will fail."""
    tasks = Tasks()
    limit = BacklogLimit(tasks.count, 10)
    tasks.failing = True
    answers = await asyncio.gather(*(put(limit, tasks) for _ in range(9)), return_exceptions=True)
    assert sum(isinstance(answer, QueueUnavailable) for answer in answers) == 1
    assert tasks.counted == 1


@pytest.mark.usefixtures("counted_for")
@pytest.mark.parametrize("seed", range(20))
async def test_concurrent_requests_never_exceed_the_limit(seed: int) -> None:
    """Tasks finish at any moment meanwhile. When all have finished, the backlog is empty again."""
    random, tasks = Random(seed), Tasks()
    limit = BacklogLimit(tasks.count, 10)

    async def requests() -> None:
        for _ in range(30):
            await put(limit, tasks, random.randint(1, 3))
            await pauses(random.randint(0, 3))

    async def work() -> None:
        for _ in range(60):
            tasks.finish(random.randint(0, tasks.unfinished))
            await pauses(random.randint(0, 3))

    await asyncio.gather(work(), *(requests() for _ in range(8)))
    assert tasks.most <= 10
    tasks.finish(tasks.unfinished)
    assert [await put(limit, tasks) for _ in range(11)] == [True] * 10 + [False]


async def pauses(number: int) -> None:
    """Let other tasks of the loop run for so many iterations."""
    for _ in range(number):
        await asyncio.sleep(0)


async def test_as_many_places_are_reserved_as_there_are() -> None:
    tasks = Tasks(unfinished=7)
    limit = BacklogLimit(tasks.count, 10)
    assert await limit.reserve_up_to(2) == 2
    await tasks.put(2)
    limit.release(2)
    assert await limit.reserve_up_to(500) == 1
    with pytest.raises(BacklogFull):
        await limit.reserve_up_to(500)
    limit.release(1)  # its commit has failed
    assert await limit.reserve_up_to(500) == 1
