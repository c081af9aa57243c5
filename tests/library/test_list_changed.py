"""The engine's list of changed tasks, on both engines: it has every change, and is bounded."""

import random
from collections.abc import Sequence
from dataclasses import replace

import pytest

from afterward.engine import Engine
from afterward.filter import TaskFilter
from afterward.task import WAITING, Outcome, Status, Task, Writes
from tests.library.support import (
    KINDS,
    LEASE,
    NOW,
    a_task,
    claim,
    claim_all,
    claim_one,
    put,
    recover,
    retry,
)

pytestmark = pytest.mark.anyio
SINCE = NOW + 100
LATER = NOW + 200


async def changed(
    engine: Engine, since: float = SINCE, *, client: str = "", now: float = LATER, limit: int = 100
) -> list[Task]:
    tasks = await engine.list_changed(client, since=since, now=now, limit=limit)
    assert tasks is not None
    return tasks


def as_listed(*tasks: Task) -> list[Task]:
    """Return the tasks without the fields that a list of changes leaves out."""
    return [replace(task, arguments="", history=None) for task in tasks]


async def test_a_task_is_listed_once_as_it_is_now_without_arguments_and_history(
    engine: Engine,
) -> None:
    await put(engine, task := a_task(at=SINCE))
    assert await changed(engine) == as_listed(task)
    claimed = await claim_one(engine, now=SINCE + 1)
    assert await changed(engine) == as_listed(claimed)
    failed = Outcome(Status.FAILED, error='{"type": "PermanentError"}')
    settled = await engine.settle(claimed, failed, SINCE + 2)
    assert settled is not None
    assert settled.history is not None
    assert await changed(engine) == as_listed(settled)
    assert await changed(engine, SINCE + 2.001) == []


async def test_old_tasks_that_have_changed_are_listed_in_the_order_of_their_changes(
    engine: Engine,
) -> None:
    """Each change is one that an old task can go through."""
    tasks = [a_task() for _ in range(9)]
    await put(engine, *tasks)
    started, reported, done, failed, retrying, given_back, crashed = [
        (await claim(engine, limit=1)).running[0] for _ in range(7)
    ]
    cancelled, requeued = tasks[7:]
    await engine.cancel(requeued.id, NOW)
    assert await changed(engine, now=SINCE) == []

    error = '{"type":"TemporaryError"}'
    await engine.settle(given_back, Outcome(Status.QUEUED, due_at=SINCE, counts=False), SINCE)
    await engine.report(reported, 0.5, SINCE + 1)
    await engine.settle(done, Outcome(Status.SUCCEEDED), SINCE + 2)
    await engine.settle(failed, Outcome(Status.FAILED, error=error), SINCE + 3)
    later = SINCE + 999
    await engine.settle(retrying, Outcome(Status.RETRYING, due_at=later, error=error), SINCE + 4)
    await engine.cancel(cancelled.id, SINCE + 5)
    await retry(engine, requeued.id, SINCE + 6, Writes())
    await engine.extend("worker-1", now=SINCE, lease=2 * LEASE)
    await put(engine, new := a_task(at=SINCE + 7), planned := a_task(at=SINCE + 8, due_at=later))
    listed = await changed(engine)
    expected = [given_back, reported, done, failed, retrying, cancelled, requeued, new, planned]
    assert [task.id for task in listed] == [task.id for task in expected]
    assert listed == as_listed(*[await engine.get(task.id) for task in listed])
    assert {started.id, crashed.id}.isdisjoint(task.id for task in listed)


async def test_suspects_are_listed(engine: Engine) -> None:
    """Suspects are tasks that have crashed their worker, perhaps."""
    await put(engine, a_task(), a_task())
    await claim_all(engine, now=SINCE - LEASE)
    crashed = await recover(engine, now=SINCE)
    assert await changed(engine) == as_listed(*crashed)
    (suspect,) = (await claim(engine, "worker-3", now=SINCE + 1)).running
    given_back = Outcome(Status.QUEUED, due_at=SINCE + 2, counts=False)
    await engine.settle(suspect, given_back, SINCE + 2)
    assert [task.id for task in await changed(engine, SINCE + 1)] == [suspect.id]


async def test_only_the_tasks_of_the_client_are_listed(engine: Engine) -> None:
    mine, theirs = a_task(at=SINCE, client="ada"), a_task(at=SINCE, client="grace")
    await put(engine, mine, theirs)
    assert await changed(engine, client="ada") == as_listed(mine)
    await claim_all(engine, now=SINCE)
    assert [task.id for task in await changed(engine, client="ada")] == [mine.id]
    assert await changed(engine) == []


async def test_retrying_tasks_that_have_not_changed_do_not_count(engine: Engine) -> None:
    """During an outage, more tasks may be retrying than a list may have."""
    await put(engine, *(a_task(client=client) for client in ("ada", "ada", "ada", "grace")))
    retrying = Outcome(Status.RETRYING, due_at=LATER + 900, error='{"type":"TemporaryError"}')
    *unchanged, mine, theirs = await claim_all(engine)
    for task in unchanged:
        await engine.settle(task, retrying, NOW)
    for task in (mine, theirs):
        await engine.settle(task, retrying, SINCE)
    listed = await changed(engine, client="ada", limit=1)
    assert [task.id for task in listed] == [mine.id]


async def test_no_list_is_returned_if_too_many_tasks_would_be_read(engine: Engine) -> None:
    """The new and the running tasks of other clients are read, too, but not the finished ones."""

    async def is_listed(limit: int) -> bool:
        tasks = await engine.list_changed("ada", since=SINCE, now=LATER, limit=limit)
        return tasks is not None

    await put(engine, *(a_task(at=SINCE, client="ada") for _ in range(3)))
    await put(engine, *(a_task(at=SINCE, client="grace") for _ in range(4)))
    assert await is_listed(3 + 4)
    theirs = [task for task in await claim_all(engine, now=SINCE) if task.client == "grace"]
    assert await is_listed(7)
    assert not await is_listed(6)
    for task in theirs:
        await engine.settle(task, Outcome(Status.SUCCEEDED), SINCE)
    assert await is_listed(3)
    assert not await is_listed(2)
    assert await changed(engine, LATER, client="ada", limit=3) == []


@pytest.mark.thorough
async def test_every_change_is_listed_after_chance_operations(engine: Engine) -> None:
    """The list agrees with a filter in Python, for many moments since when."""
    chance = random.Random(16)
    now = NOW
    for _ in range(150):
        now += chance.choice((0.0, 0.25, 1.0))
        await change_by_chance(engine, chance, now)
    tasks = [
        task
        for client in ("", "ada")
        for task in await engine.list_tasks(TaskFilter(client=client), limit=1_000)
    ]
    assert {task.status for task in tasks} == {*Status}
    for since in (NOW, *(chance.uniform(NOW, now) for _ in range(25)), now):
        for client in ("", "ada"):
            expected = [task for task in tasks if task.client == client]
            expected = [task for task in expected if task.updated_at >= since]
            expected.sort(key=lambda task: (task.updated_at, task.id))
            listed = await changed(engine, since, client=client, now=now, limit=1_000)
            assert listed == as_listed(*expected)


async def change_by_chance(engine: Engine, chance: random.Random, now: float) -> None:
    """Put tasks, and change others in one of the ways in which tasks change."""
    await put(engine, *chance_new_tasks(chance, now))
    often = claim_some, settle_some
    change = chance.choice((*often, *often, cancel_some, retry_some, run_some_now))
    await change(engine, chance, now)


async def claim_some(engine: Engine, chance: random.Random, now: float) -> None:
    owner, lease = chance.choice(("worker-1", "worker-2")), chance.choice((1.0, LEASE))
    await engine.claim(owner, kinds=KINDS, limit=3, now=now, lease=lease)


async def settle_some(engine: Engine, chance: random.Random, now: float) -> None:
    for task in await some(engine, chance, Status.RUNNING):
        await engine.settle(task, chance_outcome(chance, now), now)


async def cancel_some(engine: Engine, chance: random.Random, now: float) -> None:
    for task in await some(engine, chance, *WAITING):
        await engine.cancel(task.id, now)


async def retry_some(engine: Engine, chance: random.Random, now: float) -> None:
    for task in await some(engine, chance, Status.FAILED, Status.CANCELLED):
        await retry(engine, task.id, now, Writes())


async def run_some_now(engine: Engine, chance: random.Random, now: float) -> None:
    for task in await some(engine, chance, Status.RETRYING):
        await engine.run_now(task.id, now)


async def some(engine: Engine, chance: random.Random, *statuses: Status) -> Sequence[Task]:
    tasks = await engine.list_tasks(TaskFilter(statuses=statuses), limit=1_000)
    return chance.sample(tasks, min(2, len(tasks)))


def chance_new_tasks(chance: random.Random, now: float) -> list[Task]:
    kind, client = chance.choice(KINDS), chance.choice(("", "ada"))
    due_at = now + chance.choice((0.0, 0.0, 30.0))
    return [a_task(at=now, due_at=due_at, kind=kind, client=client) for _ in range(2)]


def chance_outcome(chance: random.Random, now: float) -> Outcome:
    status = chance.choice((*WAITING, Status.SUCCEEDED, Status.FAILED))
    counts = status is not Status.QUEUED  # if not, the task is given back, and is due at once
    return Outcome(
        status,
        due_at=now + counts * chance.choice((0.0, 5.0)) if status in WAITING else None,
        error="{}" if status in (Status.RETRYING, Status.FAILED) else None,
        counts=counts,
    )
