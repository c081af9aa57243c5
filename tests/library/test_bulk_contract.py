"""The contract of an engine for bulk actions, batches and `run_now`, on SQLite and PostgreSQL."""

import asyncio
import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import pytest

from afterward.bulk import COLLECTION, Action, Slice
from afterward.engine import Engine
from afterward.errors import RecordNotFound, TaskNotFound, TaskNotRetrying
from afterward.filter import TaskFilter
from afterward.retry import Bounds
from afterward.task import Outcome, Status, Task, Writes, new_id, to_json
from tests.library.support import (
    DAY,
    KINDS,
    LEASE,
    NOW,
    a_task,
    claim,
    claim_all,
    claim_one,
    in_batch,
    put,
    recover,
)

pytestmark = pytest.mark.anyio

AN_ERROR = to_json({"type": "PermanentError", "detail": "no", "smtp_code": 550})
LATER = NOW + 100  # the time of the slices


async def failed_tasks(
    engine: Engine, number: int, *, at: float = NOW, **changes: Any
) -> list[Task]:
    """Put tasks that have failed at this time, the oldest first."""
    tasks = [a_task(**changes) for _ in range(number)]
    await put(engine, *tasks)
    kinds = [*KINDS, "retired"]
    claimed = await engine.claim("worker-1", kinds=kinds, limit=1_000, now=NOW, lease=LEASE)
    for task in claimed.running:
        await engine.settle(task, Outcome(Status.FAILED, error=AN_ERROR), at)
    return [await engine.get(task.id) for task in tasks]


async def an_action(engine: Engine, owner: str = "worker-1", **changes: Any) -> Task:
    """Put and claim the durable task of a bulk action. It is due before all others."""
    await put(engine, a_task(due_at=NOW - DAY, **changes))
    return await claim_one(engine, owner)


def retries(at: float = LATER, **conditions: Any) -> TaskFilter:
    return TaskFilter(**conditions).acted_on(Action.RETRY, at)


def cancels(at: float = LATER, **conditions: Any) -> TaskFilter:
    return TaskFilter(**conditions).acted_on(Action.CANCEL, at)


def eight_attempts(_: str) -> Bounds:
    return Bounds(max_attempts=8)


async def do_slice(
    engine: Engine,
    action: Task,
    wanted: TaskFilter,
    *,
    limit: int = 100,
    most: int = 1_000,
    bounds_of: Callable[[str], Bounds] = eight_attempts,
    now: float = LATER,
) -> Slice:
    piece = await engine.change_slice(
        action, wanted, limit=limit, most=most, bounds_of=bounds_of, now=now
    )
    assert piece is not None
    return piece


def ids(tasks: Iterable[Task]) -> set[str]:
    return {task.id for task in tasks}


async def statuses(engine: Engine, tasks: Iterable[Task]) -> list[Status]:
    return [(await engine.get(task.id)).status for task in tasks]


# Slices


async def test_slices_retry_the_newest_tasks_first_below_the_last_slice(engine: Engine) -> None:
    tasks = await failed_tasks(engine, 5)
    action = await an_action(engine)
    slices = [await do_slice(engine, action, retries(), limit=2) for _ in range(4)]
    assert [ids(piece.changed) for piece in slices] == [
        ids(tasks[3:]),
        ids(tasks[1:3]),
        ids(tasks[:1]),
        set(),
    ]
    assert [(piece.done, piece.is_last) for piece in slices] == [
        (2, False),
        (4, False),
        (5, True),
        (5, True),
    ]


async def test_a_slice_changes_tasks_as_a_retry_by_hand_does(engine: Engine) -> None:
    by_hand, in_slice = await failed_tasks(engine, 2, kind="send_email", about="ada")
    action = await an_action(engine)
    expected = await engine.retry(by_hand.id, LATER, Writes(), max_attempts=8, gives_up_at=None)
    piece = await do_slice(engine, action, retries())
    retried = await engine.get(in_slice.id)
    assert retried == replace(
        expected, id=in_slice.id, created_at=in_slice.created_at, history=in_slice.history
    )
    assert piece.changed == (replace(retried, arguments="", history=None),)
    assert ids(await claim_all(engine, now=LATER)) == {by_hand.id, in_slice.id}


async def test_a_slice_cancels_tasks_as_a_cancellation_by_hand_does(engine: Engine) -> None:
    by_hand, in_slice = a_task(about="ada"), a_task(about="ada")
    action = await an_action(engine)
    await put(engine, by_hand, in_slice)
    expected = await engine.cancel(by_hand.id, LATER)
    piece = await do_slice(engine, action, cancels())
    cancelled = await engine.get(in_slice.id)
    assert cancelled == replace(expected, id=in_slice.id)
    assert piece == Slice((replace(cancelled, arguments=""),), 1, is_last=True)


async def test_a_retried_task_gets_the_bounds_of_its_kind(engine: Engine) -> None:
    await failed_tasks(engine, 2, kind="send_email")
    await failed_tasks(engine, 1, kind="work")
    bounds = {"send_email": Bounds(gives_up_at=NOW + DAY), "work": Bounds(max_attempts=3)}
    piece = await do_slice(engine, await an_action(engine), retries(), bounds_of=bounds.__getitem__)
    assert {(task.kind, task.max_attempts, task.gives_up_at) for task in piece.changed} == {
        ("send_email", None, NOW + DAY),
        ("work", 3, None),
    }
    assert len(piece.changed) == 3


async def test_an_action_changes_only_the_tasks_of_its_client_that_match(engine: Engine) -> None:
    (mine,) = await failed_tasks(engine, 1, client="ada", kind="send_email")
    others = await failed_tasks(engine, 1, client="ada", kind="work")
    others += await failed_tasks(engine, 1, client="eve", kind="send_email")
    others += await failed_tasks(engine, 1, kind="send_email")
    action = await an_action(engine, client="ada")
    piece = await do_slice(engine, action, retries(client="ada", kind="send_email"))
    assert ids(piece.changed) == {mine.id}
    assert await statuses(engine, others) == [Status.FAILED] * 3


@pytest.mark.parametrize(
    "conditions",
    [
        {"kind": "send_email"},
        {"about": "ada@example.com"},
        {"batch_id": "batch"},
        {"request_id": "request"},
        {"error": "PermanentError 550"},
        {"since": NOW, "until": NOW + 1},
        {"statuses": (Status.FAILED, Status.QUEUED)},
    ],
    ids=str,
)
async def test_an_action_selects_by_any_condition(
    engine: Engine, conditions: dict[str, Any]
) -> None:
    (matching,) = await failed_tasks(
        engine,
        1,
        kind="send_email",
        about="ada@example.com",
        batch_id="batch",
        request_id="request",
    )
    other = a_task(at=NOW - 9)
    await put(engine, other)
    await engine.cancel(other.id, NOW - 9)
    piece = await do_slice(engine, await an_action(engine), retries(**conditions))
    assert ids(piece.changed) == {matching.id}


async def test_statuses_that_do_not_allow_the_action_match_nothing(engine: Engine) -> None:
    tasks = await failed_tasks(engine, 2)
    action = await an_action(engine)
    await put(engine, waiting := a_task())
    assert await engine.count_tasks(retries(statuses=(Status.QUEUED,))) == 0
    for wanted in (
        retries(statuses=(Status.QUEUED, Status.SUCCEEDED)),
        cancels(statuses=(Status.FAILED,)),
        cancels(error="PermanentError 550"),
    ):
        assert await do_slice(engine, action, wanted) == Slice((), 0, is_last=True)
    assert await statuses(engine, [*tasks, waiting]) == [Status.FAILED] * 2 + [Status.QUEUED]


async def test_failed_and_cancelled_tasks_are_retried_and_no_others(engine: Engine) -> None:
    (failed,) = await failed_tasks(engine, 1)
    await put(engine, succeeded := a_task())
    await engine.settle(await claim_one(engine), Outcome(Status.SUCCEEDED), NOW)
    action = await an_action(engine)
    await put(engine, cancelled := a_task(), queued := a_task())
    await engine.cancel(cancelled.id, NOW)
    piece = await do_slice(engine, action, retries())
    assert ids(piece.changed) == {failed.id, cancelled.id}
    assert (await engine.get(queued.id)).updated_at == NOW
    assert await statuses(engine, [succeeded, action]) == [Status.SUCCEEDED, Status.RUNNING]


async def test_queued_and_retrying_tasks_are_cancelled_and_no_others(engine: Engine) -> None:
    await put(engine, retrying := a_task(), running := a_task())
    outcome = Outcome(Status.RETRYING, due_at=LATER, error=AN_ERROR)
    first, _ = await claim_all(engine)
    await engine.settle(first, outcome, NOW)
    action = await an_action(engine)
    await put(engine, queued := a_task(), crashed := a_task(due_at=NOW - 1))
    await claim_one(engine, "worker-2")
    await engine.extend("worker-1", now=NOW + LEASE, lease=LEASE)
    (suspect,) = await recover(engine, "worker-3", now=NOW + LEASE)
    assert suspect.id == crashed.id
    piece = await do_slice(engine, action, cancels())
    assert ids(piece.changed) >= {retrying.id, crashed.id}
    assert await statuses(engine, [running, action]) == [Status.RUNNING] * 2
    assert (await engine.get(queued.id)).status is not Status.QUEUED


# The set of the tasks


async def test_a_task_that_ended_after_the_acceptance_is_not_retried(engine: Engine) -> None:
    tasks = [(await failed_tasks(engine, 1, at=NOW + seconds))[0] for seconds in (0, 1, 2)]
    action = await an_action(engine)
    assert await engine.count_tasks(retries(NOW + 1)) == 2
    piece = await do_slice(engine, action, retries(NOW + 1))
    assert ids(piece.changed) == ids(tasks[:2])


async def test_a_task_that_was_created_after_the_acceptance_is_not_cancelled(
    engine: Engine,
) -> None:
    action = await an_action(engine)
    tasks = [a_task(at=NOW + seconds) for seconds in (0, 0.0005, 0.000_501, 1)]
    await put(engine, *tasks)
    assert await engine.count_tasks(cancels(NOW + 0.0005)) == 2
    piece = await do_slice(engine, action, cancels(NOW + 0.0005))
    assert ids(piece.changed) == ids(tasks[:2])


async def test_a_task_that_ran_at_the_acceptance_is_not_cancelled(engine: Engine) -> None:
    """It was not counted, so the action must not change it when it waits for its next attempt."""
    await put(engine, running := a_task(), crashed := a_task())
    claimed = await claim_all(engine)
    action = await an_action(engine)
    for task in claimed:
        outcome = Outcome(Status.RETRYING, due_at=LATER, error=AN_ERROR)
        await engine.settle(task, outcome, NOW + 2)
    assert await engine.count_tasks(cancels(NOW + 1)) == 0
    assert await do_slice(engine, action, cancels(NOW + 1)) == Slice((), 0, is_last=True)
    assert await statuses(engine, [running, crashed]) == [Status.RETRYING] * 2


async def test_a_task_that_was_created_after_the_acceptance_is_not_retried(
    engine: Engine,
) -> None:
    """The clock of the worker that has ended it is behind."""
    tasks = [a_task(at=NOW), a_task(at=NOW + 2)]
    await put(engine, *tasks)
    for task in tasks:
        await engine.cancel(task.id, NOW)
    piece = await do_slice(engine, await an_action(engine), retries(NOW + 1))
    assert ids(piece.changed) == {tasks[0].id}


async def test_all_slices_together_change_no_more_tasks_than_they_may(engine: Engine) -> None:
    tasks = await failed_tasks(engine, 5)
    action = await an_action(engine)
    slices = [await do_slice(engine, action, retries(), limit=2, most=3) for _ in range(3)]
    assert [(len(piece.changed), piece.done, piece.is_last) for piece in slices] == [
        (2, 2, False),
        (1, 3, True),
        (0, 3, True),
    ]
    assert await statuses(engine, tasks) == [Status.FAILED] * 2 + [Status.QUEUED] * 3


def test_an_earlier_end_of_the_filter_stays() -> None:
    assert cancels(NOW, until=NOW - 1).until == NOW - 1
    assert cancels(NOW, until=0.0).until == 0.0


async def test_no_task_is_retried_twice_if_the_clock_is_set_back(engine: Engine) -> None:
    """The retried tasks fail again, at a time before the acceptance. The cursor leaves them out."""
    tasks = await failed_tasks(engine, 4)
    action = await an_action(engine)
    first = await do_slice(engine, action, retries(), limit=2, now=NOW - DAY)
    for task in await claim_all(engine, now=NOW - DAY):
        await engine.settle(task, Outcome(Status.FAILED, error=AN_ERROR), NOW - DAY)
    second = await do_slice(engine, action, retries(), limit=9, now=NOW - DAY)
    assert (ids(first.changed), ids(second.changed)) == (ids(tasks[2:]), ids(tasks[:2]))
    assert (second.done, second.is_last) == (4, True)


async def test_a_task_that_has_changed_or_was_removed_in_the_meantime_is_left_out(
    engine: Engine,
) -> None:
    retried, removed, left = await failed_tasks(engine, 3)
    action = await an_action(engine)
    again = await engine.retry(retried.id, NOW, Writes(), max_attempts=8, gives_up_at=None)
    await failed_tasks(engine, 0)  # claims it, and lets it fail ...
    assert (await engine.get(again.id)).finished_at == NOW
    await engine.retry(again.id, NOW, Writes(), max_attempts=8, gives_up_at=None)
    await failed_tasks(engine, 0, at=NOW + 9)  # ... and again, after the acceptance
    await engine.retry(removed.id, NOW, Writes(), max_attempts=8, gives_up_at=None)
    await engine.cancel(removed.id, NOW - DAY)
    await engine.purge(finished_before=NOW, failed_before=0, answered_before=0, limit=9)
    piece = await do_slice(engine, action, retries(NOW + 1))
    assert ids(piece.changed) == {left.id}
    assert (piece.done, piece.is_last) == (1, True)


# The durable task of the action


async def test_the_next_attempt_goes_on_where_a_crash_has_stopped_the_action(
    engine: Engine,
) -> None:
    tasks = await failed_tasks(engine, 3)
    action = await an_action(engine, "worker-1")
    await do_slice(engine, action, retries(), limit=1)
    await recover(engine, "worker-2", now=NOW + LEASE)
    again = await claim_one(engine, "worker-2", now=NOW + LEASE)
    assert again.id == action.id
    piece = await do_slice(engine, again, retries(), limit=9)
    assert ids(piece.changed) == ids(tasks[:2])
    assert piece.done == 3


async def test_a_slice_forgives_the_crashes_before_it(engine: Engine) -> None:
    """So an action survives any number of crashes, as long as it gets on."""
    await failed_tasks(engine, 9, kind="retired")
    action = await an_action(engine, "worker-0", max_attempts=None, gives_up_at=NOW + DAY)
    now = NOW
    for n in range(1, 9):
        await do_slice(engine, action, retries(), limit=1)
        assert (await engine.get(action.id)).crashes == 0
        now += LEASE
        await recover(engine, f"worker-{n}", now=now)
        assert (await engine.get(action.id)).crashes == 1
        action = await claim_one(engine, f"worker-{n}", now=now)
    assert (await do_slice(engine, action, retries(), limit=9)).done == 9


async def test_a_slice_forgets_the_oldest_of_many_crashes(engine: Engine) -> None:
    """Otherwise the history of an action that crashes for days would grow without a bound."""
    await failed_tasks(engine, 2, kind="retired")
    first = await an_action(engine, "worker-1")
    twenty = replace(first, history=to_json([{"attempt": n} for n in range(20)]))
    await engine.settle(twenty, Outcome(Status.RETRYING, due_at=NOW, error=AN_ERROR), NOW)
    action = await claim_one(engine, "worker-1")
    await do_slice(engine, action, retries(), limit=1)
    assert (await engine.get(action.id)).history == action.history, "it has not crashed"
    await recover(engine, "worker-2", now=NOW + LEASE)
    action = await claim_one(engine, "worker-2", now=NOW + LEASE)
    assert len(json.loads(action.history or "")) == 21
    await do_slice(engine, action, retries(), limit=1)
    kept = json.loads((await engine.get(action.id)).history or "")
    assert [attempt["attempt"] for attempt in kept] == [*range(2, 20), 1, 2]


async def test_a_worker_that_has_lost_its_claim_changes_nothing(engine: Engine) -> None:
    tasks = await failed_tasks(engine, 2)
    action = await an_action(engine, "worker-1")
    await recover(engine, "worker-2", now=NOW + LEASE)
    for _ in ("re-queued", "claimed by another worker"):
        lost = await engine.change_slice(
            action, retries(), limit=9, most=9, bounds_of=eight_attempts, now=LATER
        )
        assert lost is None
        await claim(engine, "worker-2", limit=1, now=NOW + LEASE)
    assert await statuses(engine, tasks) == [Status.FAILED] * 2
    assert (await engine.get(action.id)).crashes == 1


async def test_a_lost_action_does_not_cancel_its_own_task(engine: Engine) -> None:
    """It finds its own task among the waiting ones, once another worker has re-queued it."""
    action = await an_action(engine, "worker-1")
    await recover(engine, "worker-2", now=NOW + LEASE)
    lost = await engine.change_slice(
        action, cancels(), limit=9, most=9, bounds_of=eight_attempts, now=LATER
    )
    assert lost is None
    assert await statuses(engine, [action]) == [Status.RETRYING]


async def test_slices_of_one_action_at_the_same_time_share_its_tasks(engine: Engine) -> None:
    """The first may still run on PostgreSQL after the connection of its caller has broken."""
    tasks = await failed_tasks(engine, 40)
    action = await an_action(engine)
    slices = await asyncio.gather(
        *(do_slice(engine, action, retries(), limit=10) for _ in range(4))
    )
    changed = [task.id for piece in slices for task in piece.changed]
    assert sorted(changed) == sorted(ids(tasks))
    assert sorted(piece.done for piece in slices) == [10, 20, 30, 40]


async def test_the_record_of_an_action_is_removed_after_its_task(engine: Engine) -> None:
    action = await an_action(engine, client="ada")
    await do_slice(engine, action, retries(client="ada"))
    record = await engine.read_record(COLLECTION, action.id, client="ada")
    assert record.body == {"cursor": None, "done": 0}
    await engine.settle(action, Outcome(Status.SUCCEEDED), NOW)
    for finished_before in (NOW, NOW + 1):
        assert await engine.read_record(COLLECTION, action.id, client="ada") == record
        await engine.purge(
            finished_before=finished_before, failed_before=0, answered_before=0, limit=9
        )
    with pytest.raises(RecordNotFound):
        await engine.read_record(COLLECTION, action.id, client=None)


async def test_retried_tasks_wake_a_waiting_worker(engine: Engine) -> None:
    await failed_tasks(engine, 1)
    action = await an_action(engine)
    await engine.wait_for_tasks(0)
    waiting = asyncio.create_task(engine.wait_for_tasks(60))
    await do_slice(engine, action, retries())
    await asyncio.wait_for(waiting, 5)


async def test_claims_and_cancellations_at_the_same_time_never_both_get_a_task(
    engine: Engine,
) -> None:
    """Heartbeats, settlements and two actions run beside them, and none waits for ever."""
    actions = [await an_action(engine), await an_action(engine)]
    tasks = [a_task(at=NOW + n / 1000) for n in range(300)]
    await put(engine, *tasks)
    claimed: set[str] = set()

    async def work(owner: str) -> None:
        while running := (await claim(engine, owner, limit=7, now=NOW + 1)).running:
            claimed.update(task.id for task in running)
            await engine.extend(owner, now=NOW + 1, lease=LEASE)
            outcome = Outcome(Status.SUCCEEDED)
            await asyncio.gather(*(engine.settle(task, outcome, NOW + 1) for task in running))

    async def cancel(action: Task) -> set[str]:
        cancelled: set[str] = set()
        is_last = False
        while not is_last:
            piece = await do_slice(engine, action, cancels(), limit=20)
            cancelled |= ids(piece.changed)
            assert piece.done == len(cancelled)
            is_last = piece.is_last
        return cancelled

    async with asyncio.timeout(60), asyncio.TaskGroup() as group:
        workers = [group.create_task(work(f"worker-{n}")) for n in range(3)]
        cancelling = [group.create_task(cancel(action)) for action in actions]
    assert len(workers) == 3
    first, second = (task.result() for task in cancelling)
    assert first.isdisjoint(second)
    assert claimed.isdisjoint(first | second)
    assert claimed | first | second == ids(tasks)
    assert await engine.count_tasks(TaskFilter(statuses=(Status.CANCELLED,))) == len(first | second)


# The next attempt, now


@pytest.mark.parametrize("now", [NOW + 1, NOW - DAY], ids=["later", "the clock is set back"])
async def test_a_retrying_task_can_be_made_due_now(engine: Engine, now: float) -> None:
    await put(engine, a_task())
    outcome = Outcome(Status.RETRYING, due_at=NOW + DAY, error=AN_ERROR)
    settled = await engine.settle(await claim_one(engine), outcome, NOW)
    assert settled is not None
    assert await claim_all(engine, now=now) == []
    await engine.wait_for_tasks(0)
    waiting = asyncio.create_task(engine.wait_for_tasks(60))
    due = await engine.run_now(settled.id, now)
    await asyncio.wait_for(waiting, 5)
    assert due == await engine.get(settled.id)
    assert due == replace(settled, due_at=now, updated_at=now)
    assert ids(await claim_all(engine, now=now)) == {settled.id}


async def test_only_a_retrying_task_can_be_made_due_now(engine: Engine) -> None:
    await put(engine, queued := a_task(due_at=NOW + 9), running := a_task(), done := a_task())
    await claim_all(engine)
    await engine.settle(await _running(engine, done), Outcome(Status.SUCCEEDED), NOW)
    for task in (queued, running, done):
        before = await engine.get(task.id)
        with pytest.raises(TaskNotRetrying, match="waits for its next attempt"):
            await engine.run_now(task.id, NOW)
        assert await engine.get(task.id) == before
    with pytest.raises(TaskNotFound):
        await engine.run_now("unknown", NOW)


async def _running(engine: Engine, task: Task) -> Task:
    return await engine.get(task.id)


# Batches


async def test_batches_are_listed_newest_first_page_by_page(engine: Engine) -> None:
    """Each batch is listed once, however many tasks it has."""
    batches = [new_id(NOW + n) for n in range(5)]
    for batch_id in batches:
        await engine.put(Writes(in_batch(batch_id, *(a_task() for _ in range(3)))))
    await put(engine, a_task())
    newest_first = batches[::-1]
    assert await engine.list_batches("", limit=9) == newest_first
    assert await engine.list_batches("", limit=2) == newest_first[:2]
    assert await engine.list_batches("", after=newest_first[1], limit=2) == newest_first[2:4]
    assert await engine.list_batches("", after=newest_first[4], limit=2) == []
    assert await engine.list_batches("", after=new_id(NOW - 1), limit=2) == []


async def test_a_client_is_shown_only_its_own_batches(engine: Engine) -> None:
    await engine.put(Writes(in_batch("adas", a_task(client="ada"))))
    await engine.put(Writes(in_batch("nobodys", a_task())))
    assert await engine.list_batches("ada", limit=9) == ["adas"]
    assert await engine.list_batches("", limit=9) == ["nobodys"]
    assert await engine.list_batches("eve", limit=9) == []


async def test_a_batch_is_listed_until_its_last_task_is_removed(engine: Engine) -> None:
    """A page can begin after a batch that has been removed."""
    batches = [new_id(NOW + n) for n in range(3)]
    tasks = [a_task() for _ in batches]
    for batch_id, task in zip(batches, tasks, strict=True):
        await engine.put(Writes(in_batch(batch_id, task, a_task())))
    cancelled = [
        await engine.cancel(task.id, NOW)
        for task in await engine.list_tasks(TaskFilter(batch_id=batches[1]), limit=9)
    ]
    assert len(cancelled) == 2
    for left in ([batches[2], batches[1], batches[0]], [batches[2], batches[0]]):
        await engine.purge(finished_before=NOW + 1, failed_before=0, answered_before=0, limit=1)
        assert await engine.list_batches("", limit=9) == left
    assert await engine.list_batches("", after=batches[1], limit=9) == [batches[0]]


# Filters and histories


@pytest.mark.parametrize(
    "conditions",
    [{}, {"batch_id": "batch"}, {"about": "ada"}, {"request_id": "request"}, {"kind": "greet"}],
    ids=str,
)
async def test_conditions_that_exclude_each_other_match_nothing(
    engine: Engine, conditions: dict[str, str]
) -> None:
    await failed_tasks(engine, 1, batch_id="batch", about="ada", request_id="request")
    wanted = TaskFilter(statuses=(Status.QUEUED,), error="PermanentError 550", **conditions)  # type: ignore[arg-type]
    assert await engine.list_tasks(wanted, limit=9) == []
    assert await engine.count_tasks(wanted) == 0


async def test_a_status_that_is_named_twice_counts_once(engine: Engine) -> None:
    (task,) = await failed_tasks(engine, 1)
    wanted = TaskFilter(statuses=(Status.FAILED, Status.FAILED))
    assert ids(await engine.list_tasks(wanted, limit=9)) == {task.id}
    assert len(await engine.list_tasks(wanted, limit=9)) == 1
    assert await engine.count_tasks(wanted) == 1


async def test_a_task_of_the_millisecond_of_until_is_found(engine: Engine) -> None:
    """Ids have milliseconds; `until` between two tasks of a millisecond must not hide the first."""
    tasks = [a_task(at=NOW + n / 1000 + 0.0001) for n in range(400)]
    await put(engine, *tasks)
    for task in tasks:
        wanted = TaskFilter(since=task.created_at, until=task.created_at + 0.0002)
        assert ids(await engine.list_tasks(wanted, limit=9)) == {task.id}


async def test_large_facts_of_an_error_are_not_kept_20_times(engine: Engine) -> None:
    """Each attempt of the history would otherwise have a copy of its own."""
    facts = {"type": "TemporaryError", "detail": "no", "smtp_code": 451}
    await put(engine, a_task(), a_task())
    for claimed, size in zip(await claim_all(engine), (15_000, 16_000), strict=True):
        error = facts | {"reply": "x" * size}
        outcome = Outcome(Status.RETRYING, due_at=NOW, error=to_json(error))
        settled = await engine.settle(claimed, outcome, NOW)
        assert settled is not None
        assert json.loads(settled.error or "") == error
        kept = error if size == 15_000 else {"type": "TemporaryError", "detail": "no"}
        assert json.loads(settled.history or "")[-1]["error"] == kept


@pytest.mark.parametrize("history", ['[{"detail":"\\u0000 \\ud800"}]', "damaged", "{}"])
async def test_no_history_keeps_a_crashed_task_from_being_requeued(
    engine: Engine, history: str
) -> None:
    """One such row would otherwise fail every claim of every worker."""
    await put(engine, a_task())
    claimed = replace(await claim_one(engine), history=history)
    outcome = Outcome(Status.RETRYING, due_at=NOW, error=AN_ERROR)
    settled = await engine.settle(claimed, outcome, NOW)
    assert settled is not None
    assert json.loads(settled.history or "")[-1]["error"] == json.loads(AN_ERROR)
    await claim_one(engine)
    (recovered,) = await recover(engine, now=NOW + LEASE)
    assert json.loads(recovered.history or "")[-1]["seconds"] is None
