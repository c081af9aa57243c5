"""A limit on the backlog: never gone over by one process, and never kept up without need."""

import asyncio
from random import Random

import pytest

from afterward import backlog_limit as limit_module
from afterward.backlog_limit import BacklogLimit
from afterward.errors import BacklogFull, QueueUnavailable
from afterward.task import Backlog, Status

pytestmark = pytest.mark.anyio


class Tasks:
    """A backlog that takes a moment to be counted, and to be added to."""

    def __init__(self, unfinished: int = 0) -> None:
        self.unfinished = self.most = unfinished
        self.finished = 0
        self.counted = 0
        self.failing = False

    async def count(self) -> Backlog:
        """What stands in the database at some moment while this runs."""
        self.counted += 1
        await asyncio.sleep(0)
        if self.failing:
            raise QueueUnavailable
        counts = {Status.QUEUED: self.unfinished, Status.SUCCEEDED: self.finished}
        await asyncio.sleep(0)
        return Backlog(counts, None)

    async def put(self, tasks: int = 1) -> None:
        """Commit so many."""
        await asyncio.sleep(0)
        self.unfinished += tasks
        self.most = max(self.most, self.unfinished)
        await asyncio.sleep(0)

    def finish(self, tasks: int) -> None:
        """End so many."""
        self.unfinished -= tasks
        self.finished += tasks


@pytest.fixture(params=[0.0, 3600.0], ids=["counted always", "counted when needed"])
def counted_for(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limit_module, "COUNT_CACHED_SECONDS", request.param)


async def put(limit: BacklogLimit, tasks: Tasks, number: int = 1) -> bool:
    """Whether there was room for so many."""
    try:
        await limit.reserve(number)
    except BacklogFull:
        return False
    await tasks.put(number)
    limit.release(number)
    return True


async def test_there_is_room_up_to_the_limit_and_no_further() -> None:
    tasks = Tasks(unfinished=7)
    limit = BacklogLimit(tasks.count, 10)
    assert [await put(limit, tasks) for _ in range(5)] == [True] * 3 + [False] * 2
    assert tasks.unfinished == 10


async def test_what_is_put_together_needs_room_together() -> None:
    tasks = Tasks()
    limit = BacklogLimit(tasks.count, 10)
    assert await put(limit, tasks, 8)
    assert not await put(limit, tasks, 3)
    assert await put(limit, tasks, 2)


async def test_what_is_no_task_needs_no_room() -> None:
    tasks = Tasks(unfinished=20)
    limit = BacklogLimit(tasks.count, 10)
    assert await put(limit, tasks, 0)
    assert not await put(limit, tasks)


async def test_room_is_there_again_as_soon_as_a_task_is_finished() -> None:
    tasks = Tasks(unfinished=10)
    limit = BacklogLimit(tasks.count, 10)
    assert not await put(limit, tasks)
    tasks.finish(1)
    assert await put(limit, tasks)
    assert not await put(limit, tasks)


async def test_room_that_was_taken_in_vain_is_given_back() -> None:
    tasks = Tasks(unfinished=9)
    limit = BacklogLimit(tasks.count, 10)
    await limit.reserve(1)
    limit.release(1)  # it was not
    assert await put(limit, tasks)


async def test_the_backlog_is_not_counted_for_each_request() -> None:
    tasks = Tasks()
    limit = BacklogLimit(tasks.count, 1000)
    for _ in range(500):
        assert await put(limit, tasks)
    assert tasks.counted <= 2


async def test_what_others_put_is_noticed_within_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = Tasks()
    limit = BacklogLimit(tasks.count, 10)
    assert await put(limit, tasks)
    tasks.unfinished = 10
    monkeypatch.setattr(limit_module, "COUNT_CACHED_SECONDS", 0.0)
    assert not await put(limit, tasks)


async def test_nobody_is_let_in_before_the_backlog_was_ever_counted() -> None:
    """Else those who come first after a start would find a full backlog empty."""
    tasks = Tasks(unfinished=10)
    limit = BacklogLimit(tasks.count, 10)
    assert not any(await asyncio.gather(*(put(limit, tasks) for _ in range(20))))
    assert tasks.counted <= 2  # together, and not one after the other


async def test_a_database_that_cannot_count_is_asked_once_and_not_by_each() -> None:
    """Who waited meanwhile goes on: the commit will tell."""
    tasks = Tasks()
    limit = BacklogLimit(tasks.count, 10)
    tasks.failing = True
    answers = await asyncio.gather(*(put(limit, tasks) for _ in range(9)), return_exceptions=True)
    assert sum(isinstance(answer, QueueUnavailable) for answer in answers) == 1
    assert tasks.counted == 1


@pytest.mark.usefixtures("counted_for")
@pytest.mark.parametrize("seed", range(20))
async def test_many_at_once_never_go_over_the_limit(seed: int) -> None:
    """While tasks finish at any moment; and once they have, there is room for as many."""
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
    """Let the others have so many turns."""
    for _ in range(number):
        await asyncio.sleep(0)
