"""The contract of an engine. It runs against SQLite and against PostgreSQL."""

import asyncio
import json
import random
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from afterward.engine import Engine
from afterward.engines import open_engine
from afterward.errors import (
    BatchNotFound,
    CannotStart,
    KeyTaken,
    QueueUnavailable,
    RecordNotFound,
    TaskHasStarted,
    TaskNotFound,
    TaskNotGivenUp,
)
from afterward.filter import FailureGroup, TaskFilter
from afterward.history import error_group
from afterward.retry import WORKER_DIED
from afterward.task import Answer, Claim, Outcome, Record, Status, Task, Writes, new_id, to_json
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
    retry,
)

pytestmark = pytest.mark.anyio

# It is random, because PostgreSQL compresses the texts in an index.
A_LONG_TEXT = "a" + "".join(random.Random(0).choices(string.ascii_letters, k=9000))


def an_answer(key: str = "key", *, at: float = NOW, **changes: Any) -> Answer:
    return replace(Answer(key, "fingerprint", "{}", "/tasks/1", at), **changes)


def a_record(
    record_id: str = "1", *, collection: str = "uploads", client: str = "", **body: Any
) -> Record:
    return Record(collection, client, record_id, body, NOW)


async def listed(
    engine: Engine,
    *,
    client: str = "",
    status: Status | None = None,
    kind: str | None = None,
    after: str | None = None,
    limit: int = 100,
) -> list[Task]:
    """Return a page of tasks. A list leaves out their arguments, which `a_task` gives them again.

    The arguments of 100 tasks can take 100 MB.
    """
    statuses = () if status is None else (status,)
    wanted = TaskFilter(client=client, statuses=statuses, kind=kind)
    tasks = await engine.list_tasks(wanted, after=after, limit=limit)
    assert {task.arguments for task in tasks} <= {""}
    return [replace(task, arguments=a_task().arguments) for task in tasks]


async def crashed_tasks(engine: Engine, owner: str = "worker-2", *, now: float) -> list[Task]:
    """Claim all tasks, and return those that the claim re-queued or failed as crashed."""
    return await recover(engine, owner, now=now)


# Choosing


def test_a_url_of_an_unknown_database_is_refused_without_its_password() -> None:
    with pytest.raises(CannotStart, match="no known database: 'oracle'") as raised:
        open_engine("oracle://scott:tiger@localhost")
    assert "tiger" not in str(raised.value)


# Putting and reading


async def test_a_task_reads_back_as_it_was_put(engine: Engine) -> None:
    task = a_task(request_id="request-1", arguments='{"args":["\\u00e4\\u0000"],"kwargs":{}}')
    await put(engine, task)
    assert await engine.get(task.id) == task


async def test_the_trace_context_is_written_with_a_task_and_read_at_its_claim(
    engine: Engine,
) -> None:
    traced, untraced = a_task(trace_context=f"00-{'4b' * 16}-{'f0' * 8}-01"), a_task()
    await put(engine, traced, untraced)
    claimed = {task.id: task.trace_context for task in await claim_all(engine)}
    assert claimed == {traced.id: traced.trace_context, untraced.id: None}


async def test_an_unknown_task_is_not_found(engine: Engine) -> None:
    with pytest.raises(TaskNotFound, match="no such task"):
        await engine.get("unknown")


async def test_tasks_records_and_the_answer_of_a_put_are_written_together(engine: Engine) -> None:
    tasks = (a_task(), a_task())
    await engine.put(Writes(tasks, (a_record(size=1),), an_answer()))
    assert [await engine.get(task.id) for task in tasks] == list(tasks)
    assert await engine.read_record("uploads", "1", client="") == a_record(size=1)
    with pytest.raises(KeyTaken):
        await engine.put(Writes(answer=an_answer()))


async def test_a_put_that_fails_writes_nothing(engine: Engine) -> None:
    await engine.put(Writes(answer=an_answer()))
    task = a_task()
    with pytest.raises(KeyTaken):
        await engine.put(Writes((task,), (a_record(),), an_answer()))
    with pytest.raises(TaskNotFound):
        await engine.get(task.id)
    with pytest.raises(RecordNotFound):
        await engine.read_record("uploads", "1", client="")


async def test_a_text_that_is_too_long_for_an_index_does_not_affect_other_puts(
    engine: Engine,
) -> None:
    """PostgreSQL refuses it, and SQLite stores it."""
    too_long, *others = a_task(request_id=A_LONG_TEXT), a_task(), a_task()
    refusal, *rest = await asyncio.gather(
        *(put(engine, task) for task in (too_long, *others)), return_exceptions=True
    )
    assert rest == [None, None]
    assert not isinstance(refusal, QueueUnavailable)  # nothing is gained by trying again
    assert [await engine.get(task.id) for task in others] == others


async def test_an_empty_put_is_allowed(engine: Engine) -> None:
    await engine.put(Writes())
    assert await listed(engine) == []


async def test_tasks_are_listed_newest_first_page_by_page(engine: Engine) -> None:
    tasks = [a_task(at=NOW + n) for n in range(5)]
    await put(engine, *tasks)
    newest_first = tasks[::-1]
    assert await listed(engine) == newest_first
    assert await listed(engine, limit=2) == newest_first[:2]
    assert await listed(engine, after=newest_first[1].id, limit=2) == newest_first[2:4]
    assert await listed(engine, after=newest_first[4].id) == []


async def test_a_list_can_be_filtered_by_status_and_by_kind(engine: Engine) -> None:
    mails = [a_task(at=NOW + n, kind="send_email") for n in range(3)]
    await put(engine, *mails, a_task(at=NOW + 9))
    cancelled = await engine.cancel(mails[0].id, NOW)
    assert await listed(engine, kind="send_email") == [mails[2], mails[1], cancelled]
    assert await listed(engine, status=Status.CANCELLED) == [cancelled]
    waiting = await listed(engine, status=Status.QUEUED, kind="send_email", after=mails[2].id)
    assert waiting == [mails[1]]


async def test_a_filter_selects_the_tasks_that_meet_all_of_its_conditions(engine: Engine) -> None:
    """Pages and counts agree with a filter in Python, for chance filters of chance tasks."""
    chance = random.Random(8)
    await put_chance_tasks(engine, chance)
    tasks = [
        task
        for client in ("", "ada")
        for task in await engine.list_tasks(TaskFilter(client=client), limit=1_000)
    ]
    assert len(tasks) == 300
    found = 0
    for _ in range(300):
        wanted, after = a_chance_filter(chance, tasks), chance.choice([None, chance.choice(tasks)])
        expected = [task for task in tasks if meets(wanted, task)]
        assert await engine.count_tasks(wanted) == len(expected)
        page = [task for task in expected if after is None or task.id < after.id][:7]
        after_id = None if after is None else after.id
        assert await engine.list_tasks(wanted, after=after_id, limit=7) == page
        found += len(page)
    assert found > 300  # so the filters were not too narrow


async def put_chance_tasks(engine: Engine, chance: random.Random) -> None:
    """Put 300 tasks of all sorts, and bring them into all statuses."""
    abouts = (None, "ada@example.com", "grace@example.com")
    tasks = [
        a_task(
            at=NOW + n // 3 * 0.0004,  # several in one millisecond
            kind=chance.choice(("greet", "work", "send_email", "retired kind")),
            client=chance.choice(("", "", "ada")),
            about=chance.choice(abouts),
            batch_id=chance.choice((None, "batch-1", "batch-2")),
            request_id=chance.choice((None, "request-1", "request-2")),
        )
        for n in range(300)
    ]
    await put(engine, *tasks)
    for task in chance.sample(tasks, 40):
        await engine.cancel(task.id, NOW)
    for task in await claim_all(engine):
        status = chance.choice((Status.FAILED, Status.SUCCEEDED, Status.RETRYING, Status.RUNNING))
        error = to_json({"type": chance.choice(("A", "B")), "smtp_code": chance.choice((550, 554))})
        if status is not Status.RUNNING:
            has_failed = status is not Status.SUCCEEDED
            outcome = Outcome(status, due_at=NOW + 1, error=error if has_failed else None)
            await engine.settle(task, outcome, NOW)


def a_chance_filter(chance: random.Random, tasks: list[Task]) -> TaskFilter:
    """Return a filter of few conditions, most of them taken from one of the tasks."""
    like = chance.choice(tasks)

    def perhaps(value: Any) -> Any:
        return value if chance.random() < 0.25 else None

    statuses = chance.choice([(), (), (like.status,), (Status.RUNNING, Status.FAILED)])
    is_failed = like.status is Status.FAILED
    return TaskFilter(
        client=like.client,
        statuses=statuses,
        kind=perhaps(like.kind),
        not_kinds=perhaps(("greet", "work")) or (),
        about=perhaps(like.about),
        batch_id=perhaps(like.batch_id),
        request_id=perhaps(like.request_id),
        error=perhaps(error_group(like.error)) if is_failed else None,
        since=perhaps(like.created_at),
        until=perhaps(like.created_at + 0.02),
    )


def meets(wanted: TaskFilter, task: Task) -> bool:
    """Tell in Python whether a task meets all conditions."""
    conditions = [
        (wanted.client, task.client),
        (wanted.kind, task.kind),
        (wanted.about, task.about),
        (wanted.batch_id, task.batch_id),
        (wanted.request_id, task.request_id),
        (wanted.error, error_group(task.error) if task.status is Status.FAILED else ""),
    ]
    return (
        all(condition in (None, value) for condition, value in conditions)
        and task.kind not in wanted.not_kinds
        and task.status in (wanted.statuses or tuple(Status))
        and (wanted.since is None or task.created_at >= wanted.since)
        and (wanted.until is None or task.created_at < wanted.until)
    )


async def test_failed_tasks_are_counted_by_their_error(engine: Engine) -> None:
    tasks = [a_task(kind=kind) for kind in ("work", "work", "work", "greet")]
    theirs = a_task(client="ada")
    await put(engine, *tasks, theirs)
    codes = {task.id: code for task, code in zip(tasks, (550, 550, None, 550), strict=True)}
    for task in await claim_all(engine):
        error = {"type": "PermanentError", "detail": task.id, "smtp_code": codes.get(task.id)}
        await engine.settle(task, Outcome(Status.FAILED, error=to_json(error)), NOW)
    groups = await engine.count_failures("")
    assert groups[0] == FailureGroup("work", "PermanentError 550", 2)
    assert {(group.kind, group.error, group.tasks) for group in groups[1:]} == {
        ("work", "PermanentError", 1),
        ("greet", "PermanentError 550", 1),
    }
    retried = await retry(engine, tasks[0].id, NOW, Writes())
    assert retried.status is Status.QUEUED
    assert [group.tasks for group in await engine.count_failures("")] == [1, 1, 1]


async def test_failed_tasks_are_kept_longer_than_others(engine: Engine) -> None:
    await put(engine, done := a_task(), failed := a_task(), old := a_task())
    by_id = {task.id: task for task in await claim_all(engine)}
    await engine.settle(by_id[done.id], Outcome(Status.SUCCEEDED), NOW)
    await engine.settle(by_id[failed.id], Outcome(Status.FAILED, error=AN_ERROR), NOW)
    await engine.settle(by_id[old.id], Outcome(Status.FAILED, error=AN_ERROR), NOW - DAY)
    purge = {"finished_before": NOW + 1, "failed_before": NOW, "answered_before": 0}
    assert await engine.purge(**purge, limit=10) == 2
    assert [task.id for task in await listed(engine)] == [failed.id]


async def test_a_page_after_a_removed_task_continues_at_its_place(engine: Engine) -> None:
    """Retention may remove the last task of the page before."""
    tasks = [a_task(at=NOW + n) for n in range(5)]
    await put(engine, *tasks)
    for removed in (tasks[2], tasks[0]):
        await engine.cancel(removed.id, NOW)
        await engine.purge(
            finished_before=NOW + 1, failed_before=NOW + 1, answered_before=NOW, limit=9
        )
    assert await listed(engine, after=tasks[2].id) == [tasks[1]]
    assert await listed(engine, after=tasks[0].id) == []
    assert await listed(engine, after=new_id(NOW + 9)) == [tasks[4], tasks[3], tasks[1]]


async def test_a_page_after_a_removed_task_of_a_batch_skips_no_task(engine: Engine) -> None:
    """The tasks of a batch have the same time of acceptance, so it does not order them."""
    tasks = [a_task() for _ in range(100)]
    await engine.put(Writes(in_batch("batch", *tasks)))
    removed = tasks.pop(50)
    await engine.cancel(removed.id, NOW)
    await engine.purge(finished_before=NOW + 1, failed_before=NOW + 1, answered_before=NOW, limit=9)
    shown = [task.id for task in await listed(engine, after=removed.id, limit=100)]
    assert shown == [task.id for task in reversed(tasks[:50])]


async def test_pages_show_every_task_when_ids_are_committed_out_of_order(engine: Engine) -> None:
    """The ids of a batch are from the same moment, and a second machine commits an older id later.

    Half of the tasks are removed after the page that showed them.
    """
    late = a_task(at=NOW - 1)
    batch = in_batch("batch", *(a_task() for _ in range(20)))
    await engine.put(Writes(batch))
    await put(engine, late)
    newest_first = [*batch[::-1], late]
    pages, after = list[Task](), None
    while page := await listed(engine, after=after, limit=3):
        after = page[-1].id
        pages += page
        for task in page[1:]:
            await engine.cancel(task.id, NOW)
        await engine.purge(
            finished_before=NOW + 1, failed_before=NOW + 1, answered_before=0, limit=9
        )
    assert pages == newest_first


async def test_a_list_of_a_status_shows_all_its_tasks(engine: Engine) -> None:
    tasks = [a_task() for _ in range(5)]
    await put(engine, *tasks)
    running = [*(await claim(engine, limit=2)).running]
    failed = await claim_one(engine)
    await engine.settle(failed, Outcome(Status.FAILED, error="{}"), NOW)
    assert await listed(engine, status=Status.RUNNING) == running[::-1]
    assert await listed(engine, status=Status.RUNNING, after=running[1].id) == running[:1]
    assert [task.id for task in await listed(engine, status=Status.FAILED)] == [failed.id]
    assert await listed(engine, status=Status.QUEUED) == tasks[:2:-1]


# Claiming


async def test_the_task_that_is_due_longest_is_claimed_first(engine: Engine) -> None:
    """Claims follow the due times. Of two tasks with the same due time, the older comes first."""
    late, early, same = a_task(due_at=NOW - 1), a_task(due_at=NOW - 2), a_task(due_at=NOW - 1)
    await put(engine, late, early, same)
    assert (await claim_one(engine)).id == early.id
    assert [task.id for task in await claim_all(engine)] == [late.id, same.id]


async def test_a_claim_takes_at_most_its_limit(engine: Engine) -> None:
    await put(engine, *(a_task() for _ in range(5)))
    assert len((await claim(engine, limit=3)).running) == 3
    assert len(await claim_all(engine)) == 2


async def test_no_task_is_claimed_before_it_is_due(engine: Engine) -> None:
    await put(engine, a_task(due_at=NOW + 10))
    assert await claim_all(engine, now=NOW + 9.9) == []
    assert len(await claim_all(engine, now=NOW + 10)) == 1


@pytest.mark.parametrize("back", [1.0, 600.0, DAY, 400 * DAY])
async def test_a_task_that_was_due_stays_due_when_the_clock_is_set_back(
    engine: Engine, back: float
) -> None:
    """This includes a task that was given back, a re-queued crashed task, and a retried task."""
    new, given_back, crashed, afresh = tasks = [a_task() for _ in range(4)]
    await put(engine, crashed)
    await claim_one(engine, "worker-1")
    await crashed_tasks(engine, "worker-2", now=NOW + LEASE)
    await put(engine, afresh)
    await engine.cancel(afresh.id, NOW)
    await retry(engine, afresh.id, NOW + 1, Writes())
    await put(engine, given_back)
    claimed = await engine.claim(
        "worker-2", kinds=KINDS, limit=1, suspect=False, now=NOW, lease=LEASE
    )
    await engine.settle(
        claimed.running[0], Outcome(Status.QUEUED, due_at=NOW + 2, counts=False), NOW + 2
    )
    await put(engine, new)

    again = await claim_all(engine, now=NOW - back)
    assert {task.id for task in again} == {task.id for task in tasks}


async def pull_forward(engine: Engine, *, kinds: Sequence[str] = KINDS, limit: int = 1000) -> int:
    """Pull the retries forward that wait for more than a minute."""
    return await engine.pull_forward(kinds=kinds, now=NOW, longest_wait=60, limit=limit)


async def test_a_retry_that_would_wait_too_long_is_pulled_forward(engine: Engine) -> None:
    """Such a wait means that the clock was set back.

    A queued task keeps its due time, because the application chose it on purpose.
    """
    await put(engine, near := a_task(), far := a_task())
    for task, wait in zip(await claim_all(engine), (60, 61), strict=True):
        await engine.settle(task, Outcome(Status.RETRYING, due_at=NOW + wait), NOW)
    await put(engine, a_task(due_at=NOW + 3600))
    assert await pull_forward(engine) == 1
    assert [task.id for task in await claim_all(engine)] == [far.id]
    assert [task.id for task in await claim_all(engine, now=NOW + 60)] == [near.id]


async def test_only_retries_of_the_named_kinds_are_pulled_forward_up_to_the_limit(
    engine: Engine,
) -> None:
    """A worker does not know how long a retry of another kind may wait."""
    await put(engine, *(a_task(kind=kind) for kind in ("greet", "greet", "send_email", "work")))
    for task in await claim_all(engine):
        await engine.settle(task, Outcome(Status.RETRYING, due_at=NOW + 61), NOW)
    kinds = ("greet", "send_email")
    assert await pull_forward(engine, kinds=kinds, limit=2) == 2
    assert await pull_forward(engine, kinds=kinds, limit=2) == 1
    assert await pull_forward(engine, kinds=kinds, limit=2) == 0
    assert {task.kind for task in await claim_all(engine)} == {*kinds}
    assert [task.kind for task in await claim_all(engine, now=NOW + 61)] == ["work"]


async def test_a_claim_takes_tasks_of_the_named_kinds_only(engine: Engine) -> None:
    """The oldest tasks of all named kinds come first; tasks of other kinds wait unchanged."""
    greeting, mail, old = a_task(), a_task(kind="send_email"), a_task(due_at=NOW - 9)
    unknown = a_task(kind="unknown", at=NOW - 99)
    await put(engine, greeting, mail, unknown, old)

    async def claim_kinds(*kinds: str, limit: int = 9) -> list[str]:
        claimed = await engine.claim("worker-1", kinds=kinds, limit=limit, now=NOW, lease=LEASE)
        return [task.id for task in claimed.running]

    assert await claim_kinds() == []
    assert await claim_kinds("send_email", "greet", limit=2) == [old.id, greeting.id]
    assert await claim_kinds("greet") == []
    assert await claim_kinds("send_email", "save_data") == [mail.id]
    assert await listed(engine, status=Status.QUEUED) == [unknown]
    assert (await engine.backlog()).oldest_due_at == unknown.due_at


async def test_urgent_tasks_are_claimed_first_also_when_they_run_again(engine: Engine) -> None:
    """A stop, or a retry, must not send a bulk cancellation behind the tasks that it cancels."""
    await put(engine, *(a_task(at=NOW - 9) for _ in range(4)))
    await put(engine, urgent := a_task(kind="work", at=NOW))

    async def claim_urgent(now: float, limit: int = 1) -> list[Task]:
        claimed = await engine.claim(
            "worker-1", kinds=KINDS, urgent=["work"], limit=limit, now=now, lease=DAY
        )
        return [*claimed.running]

    (first,) = await claim_urgent(NOW)
    await engine.settle(first, Outcome(Status.QUEUED, due_at=NOW + 1, counts=False), NOW + 1)
    (again,) = await claim_urgent(NOW + 1)
    retry_at = Outcome(Status.RETRYING, due_at=NOW + 1.0001, error="{}")
    await engine.settle(again, retry_at, NOW + 1)
    await asyncio.sleep(0.001)  # PostgreSQL has a clock of its own
    kinds = [task.kind for task in await claim_urgent(NOW + 2, limit=3)]
    assert {first.id, again.id} == {urgent.id}
    assert kinds == ["work", "greet", "greet"]
    assert await claim_urgent(NOW + 2, limit=9) != []


async def test_crashed_tasks_of_every_kind_are_requeued_but_claimed_by_kind(
    engine: Engine,
) -> None:
    await put(engine, task := a_task(kind="send_email"))
    await claim_one(engine)
    now = NOW + LEASE

    async def claim_kinds(*kinds: str) -> Claim:
        return await engine.claim("worker-2", kinds=kinds, limit=9, now=now, lease=LEASE)

    first = await claim_kinds()
    assert first.running == ()
    (requeued,) = first.recovered
    assert (requeued.id, requeued.status) == (task.id, Status.RETRYING)
    assert await claim_kinds("greet") == Claim()
    (suspect,) = (await claim_kinds("greet", "send_email")).running
    assert (suspect.id, suspect.crashes) == (task.id, 1)


async def test_an_attempt_is_counted_before_it_runs(engine: Engine) -> None:
    """Otherwise a task that kills its process would never be counted."""
    task = a_task()
    await put(engine, task)
    claimed = await claim_one(engine, now=NOW + 1)
    assert claimed == await engine.get(task.id)
    assert claimed == replace(
        task,
        status=Status.RUNNING,
        attempts=1,
        claims=1,
        owner="worker-1",
        started_at=NOW + 1,
        updated_at=NOW + 1,
    )


async def test_a_task_is_claimed_by_only_one_worker(engine: Engine) -> None:
    tasks = [a_task() for _ in range(50)]
    await put(engine, *tasks)
    claims = await asyncio.gather(*(claim(engine, f"worker-{n % 5}", limit=10) for n in range(10)))
    claimed = [task.id for one in claims for task in one.running]
    assert sorted(claimed) == sorted(task.id for task in tasks)


async def test_a_heartbeat_extends_all_leases_of_its_owner(engine: Engine) -> None:
    await put(engine, a_task(), a_task(), a_task())
    mine = [await claim_one(engine), await claim_one(engine)]
    theirs = await claim_one(engine, "worker-2")
    held = await engine.extend("worker-1", now=NOW + 10, lease=LEASE)
    assert held == {(task.id, task.claims) for task in mine}
    (taken,) = await crashed_tasks(engine, "worker-3", now=NOW + LEASE)
    assert taken.id == theirs.id
    assert await engine.extend("worker-2", now=NOW + LEASE, lease=LEASE) == set()
    both = await crashed_tasks(engine, "worker-3", now=NOW + 10 + LEASE)
    assert {task.id for task in both} == {task.id for task in mine}


# Settling

AN_ERROR = '{"type":"ValueError","detail":"no"}'
A_FAILED_ATTEMPT = (
    f'[{{"attempt":1,"started_at":{NOW},"seconds":5.0,"worker":"worker-1","error":{AN_ERROR}}}]'
)


@pytest.mark.parametrize(
    ("outcome", "finished_at", "attempts", "history"),
    [
        (Outcome(Status.SUCCEEDED, result="1"), NOW + 5, 1, None),
        (Outcome(Status.FAILED, error=AN_ERROR), NOW + 5, 1, A_FAILED_ATTEMPT),
        (Outcome(Status.RETRYING, due_at=NOW + 60, error=AN_ERROR), None, 1, A_FAILED_ATTEMPT),
        (Outcome(Status.QUEUED, due_at=NOW + 5, counts=False), None, 0, None),
    ],
    ids=["success", "failure", "retry", "given back"],
)
async def test_an_outcome_is_written(
    engine: Engine,
    outcome: Outcome,
    finished_at: float | None,
    attempts: int,
    history: str | None,
) -> None:
    """An outcome ends the claim. The attempt of a task that is given back is not counted."""
    await put(engine, a_task())
    claimed = await claim_one(engine)
    settled = await engine.settle(claimed, outcome, NOW + 5)
    assert settled == await engine.get(claimed.id)
    assert settled == replace(
        claimed,
        status=outcome.status,
        attempts=attempts,
        due_at=outcome.due_at or claimed.due_at,
        updated_at=NOW + 5,
        finished_at=finished_at,
        result=outcome.result,
        error=outcome.error,
        history=history,
    )


@pytest.mark.parametrize("code", [A_LONG_TEXT, "a\0b\ud800"], ids=["long", "not storable"])
async def test_any_group_of_errors_is_stored_and_found(engine: Engine, code: str) -> None:
    """The outcomes that are written together with it are stored too."""
    await put(engine, *(a_task() for _ in range(3)))
    failure = Outcome(Status.FAILED, error=to_json({"type": "PermanentError", "smtp_code": code}))
    outcomes = [failure, Outcome(Status.SUCCEEDED), Outcome(Status.SUCCEEDED)]
    claimed = await claim_all(engine)
    settled = await asyncio.gather(
        *(engine.settle(task, end, NOW) for task, end in zip(claimed, outcomes, strict=True))
    )
    assert [task and task.status for task in settled] == [end.status for end in outcomes]
    group = error_group(failure.error)
    assert group is not None
    assert group.startswith("PermanentError a")
    assert len(group) <= 255
    (found,) = await engine.list_tasks(TaskFilter(error=group), limit=9)
    assert found.id == claimed[0].id


async def test_unexpected_errors_are_counted(engine: Engine) -> None:
    await put(engine, a_task())
    for unexpected, errors in ((True, 1), (False, 1), (True, 2)):
        outcome = Outcome(Status.RETRYING, due_at=NOW, unexpected=unexpected)
        settled = await engine.settle(await claim_one(engine), outcome, NOW)
        assert settled is not None
        assert settled.errors == errors


async def test_crashes_in_a_row_are_counted(engine: Engine) -> None:
    """An attempt that ends by itself resets the count to 0; a task that is given back keeps it."""
    await put(engine, a_task(max_attempts=None, gives_up_at=NOW + DAY))
    now = NOW

    async def crash() -> tuple[int, Status]:
        nonlocal now
        await claim_one(engine, now=now)
        now += LEASE
        (requeued,) = await crashed_tasks(engine, now=now)
        return requeued.crashes, requeued.status

    async def end(*, counts: bool) -> None:
        outcome = Outcome(Status.RETRYING, due_at=now, counts=counts)
        await engine.settle(await claim_one(engine, now=now), outcome, now)

    assert [await crash(), await crash()] == [(1, Status.RETRYING), (2, Status.RETRYING)]
    await end(counts=True)
    assert [await crash(), await crash()] == [(1, Status.RETRYING), (2, Status.RETRYING)]
    await end(counts=False)
    assert await crash() == (3, Status.FAILED)


async def test_follow_ups_are_written_with_the_success(engine: Engine) -> None:
    await put(engine, a_task())
    follow_up = a_task()
    outcome = Outcome(Status.SUCCEEDED, follow_ups=Writes((follow_up,), (a_record(),)))
    await engine.settle(await claim_one(engine), outcome, NOW)
    assert await engine.get(follow_up.id) == follow_up
    assert await engine.read_record("uploads", "1", client="") == a_record()


async def test_a_task_is_settled_once(engine: Engine) -> None:
    await put(engine, a_task())
    claimed = await claim_one(engine)
    settled = await engine.settle(claimed, Outcome(Status.SUCCEEDED), NOW)
    assert await engine.settle(claimed, Outcome(Status.FAILED, error="{}"), NOW) is None
    assert await engine.get(claimed.id) == settled


async def test_progress_is_written(engine: Engine) -> None:
    await put(engine, a_task())
    claimed = await claim_one(engine)
    reported = await engine.report(claimed, 0.5, NOW + 1)
    assert reported == replace(claimed, progress=0.5, updated_at=NOW + 1)
    assert reported == await engine.get(claimed.id)


# Workers that die


async def test_a_task_is_requeued_when_its_lease_expires(engine: Engine) -> None:
    """It is re-queued not a moment earlier, and is then due at once."""
    await put(engine, a_task())
    claimed = await claim_one(engine, "worker-1")
    assert await crashed_tasks(engine, now=NOW + LEASE - 0.1) == []
    (recovered,) = await crashed_tasks(engine, now=NOW + LEASE)
    assert recovered == await engine.get(claimed.id)
    assert (recovered.status, recovered.crashes) == (Status.RETRYING, 1)
    assert recovered.next_attempt_at == NOW + LEASE
    assert "WorkerDied" in str(recovered.error)
    assert json.loads(recovered.history or "") == [
        {
            "attempt": 1,
            "started_at": NOW,
            "seconds": None,
            "worker": "worker-1",
            "error": json.loads(WORKER_DIED),
        }
    ]


async def test_crashed_tasks_are_claimed_one_at_a_time(engine: Engine) -> None:
    """A claim with `suspect=False` takes no crashed task at all."""
    suspects = [a_task(due_at=NOW - n) for n in (3, 2, 1)]
    await put(engine, *suspects)
    await claim_all(engine, "worker-1")
    now = NOW + LEASE
    await crashed_tasks(engine, "worker-2", now=now)
    others = [a_task(at=now) for _ in range(2)]
    await put(engine, *others)

    claimed = await engine.claim(
        "worker-2", kinds=KINDS, limit=9, suspect=False, now=now, lease=LEASE
    )
    assert [task.id for task in claimed.running] == [task.id for task in others]
    claims = [await claim_all(engine, "worker-2", now=now) for _ in range(4)]
    assert [len(tasks) for tasks in claims] == [1, 1, 1, 0]
    assert {task.id for tasks in claims for task in tasks} == {task.id for task in suspects}


async def test_a_worker_never_requeues_its_own_tasks(engine: Engine) -> None:
    """A worker that makes a claim is alive: only its heartbeat is late."""
    await put(engine, a_task())
    claimed = await claim_one(engine, "worker-1")
    assert await crashed_tasks(engine, "worker-1", now=NOW + DAY) == []
    assert await engine.get(claimed.id) == claimed


async def test_a_crash_in_the_last_attempt_fails_the_task(engine: Engine) -> None:
    await put(engine, a_task(max_attempts=1))
    await claim_one(engine, "worker-1")
    (recovered,) = await crashed_tasks(engine, now=NOW + LEASE)
    assert (recovered.status, recovered.attempts) == (Status.FAILED, 1)


# Cancelling and retrying by hand


async def test_a_waiting_task_can_be_cancelled(engine: Engine) -> None:
    task = a_task()
    await put(engine, task)
    cancelled = await engine.cancel(task.id, NOW + 1)
    assert cancelled == await engine.get(task.id)
    assert (cancelled.status, cancelled.finished_at) == (Status.CANCELLED, NOW + 1)
    assert await claim_all(engine) == []


async def test_a_task_that_has_started_cannot_be_cancelled(engine: Engine) -> None:
    await put(engine, a_task())
    claimed = await claim_one(engine)
    with pytest.raises(TaskHasStarted):
        await engine.cancel(claimed.id, NOW)
    with pytest.raises(TaskNotFound):
        await engine.cancel("unknown", NOW)
    assert await engine.get(claimed.id) == claimed


async def test_a_failed_task_can_be_queued_again(engine: Engine) -> None:
    """It is like a new task, except for its claims: they keep an earlier owner from settling it.

    Its history stays, so that people see why it was retried.
    """
    task = a_task()
    await put(engine, task)
    await engine.report(claimed := await claim_one(engine), 0.5, NOW)
    failed = await engine.settle(claimed, Outcome(Status.FAILED, error=AN_ERROR), NOW)
    assert failed is not None
    retried = await retry(engine, task.id, NOW + 7, Writes())
    assert retried == await engine.get(task.id)
    assert retried == replace(
        task,
        claims=1,
        owner="worker-1",
        history=failed.history,
        updated_at=NOW + 7,
        due_at=NOW + 7,
    )


async def test_a_waiting_task_cannot_be_retried(engine: Engine) -> None:
    task = a_task()
    await put(engine, task)
    with pytest.raises(TaskNotGivenUp):
        await retry(engine, task.id, NOW, Writes(answer=an_answer()))
    with pytest.raises(TaskNotFound):
        await retry(engine, "unknown", NOW, Writes(answer=an_answer()))
    await engine.put(Writes(answer=an_answer()))  # the refusals have not used the key


async def test_a_retry_with_a_used_idempotency_key_changes_nothing(engine: Engine) -> None:
    task = a_task()
    await engine.put(Writes((task,), answer=an_answer()))
    cancelled = await engine.cancel(task.id, NOW)
    with pytest.raises(KeyTaken):
        await retry(engine, task.id, NOW, Writes(answer=an_answer()))
    assert await engine.get(task.id) == cancelled


# Idempotency keys


async def test_a_used_idempotency_key_returns_its_first_answer(engine: Engine) -> None:
    first = an_answer(body='{"id":1}')
    await engine.put(Writes(answer=first))
    with pytest.raises(KeyTaken, match="used before") as raised:
        await engine.put(Writes(answer=an_answer(body='{"id":2}', fingerprint="another")))
    assert raised.value.answer == first


async def test_an_idempotency_key_is_free_again_after_a_day(engine: Engine) -> None:
    await engine.put(Writes(answer=an_answer()))
    with pytest.raises(KeyTaken):
        await engine.put(Writes(answer=an_answer(at=NOW + DAY)))
    await engine.put(Writes(answer=an_answer(at=NOW + DAY + 1)))


async def test_a_key_can_be_checked_without_a_write(engine: Engine) -> None:
    await engine.check_key(an_answer())
    await engine.put(Writes(answer=an_answer()))
    with pytest.raises(KeyTaken) as raised:
        await engine.check_key(an_answer(fingerprint="another", at=NOW + DAY))
    assert raised.value.answer == an_answer()
    await engine.check_key(an_answer(at=NOW + DAY + 1))


async def test_a_hundred_requests_with_the_same_idempotency_key_make_one_task(
    engine: Engine,
) -> None:
    writes = [Writes((a_task(),), answer=an_answer()) for _ in range(100)]
    outcomes = await asyncio.gather(*map(engine.put, writes), return_exceptions=True)
    assert Counter(map(type, outcomes)) == {type(None): 1, KeyTaken: 99}
    assert len(await listed(engine)) == 1


# Records


async def test_a_record_replaces_the_record_of_the_same_name(engine: Engine) -> None:
    await engine.put(Writes(records=(a_record(size=1),)))
    await engine.put(Writes(records=(a_record(size=2),)))
    assert (await engine.read_record("uploads", "1", client="")).body == {"size": 2}


async def test_records_are_listed_by_descending_id_page_by_page(engine: Engine) -> None:
    records = [a_record(str(n)) for n in range(5)]
    await engine.put(Writes(records=(*records, a_record(collection="saved"))))
    page = await engine.list_records("uploads", client="", after=None, limit=2)
    assert page == [records[4], records[3]]
    assert await engine.list_records("uploads", client="", after="3", limit=9) == records[2::-1]


async def test_a_deleted_record_cannot_be_updated(engine: Engine) -> None:
    await engine.put(Writes(records=(a_record(size=1),)))
    assert await engine.update_record(a_record(size=2))
    assert (await engine.read_record("uploads", "1", client="")).body == {"size": 2}
    assert await engine.delete_record(a_record())
    assert not await engine.update_record(a_record(size=3))
    assert not await engine.delete_record(a_record())
    with pytest.raises(RecordNotFound):
        await engine.read_record("uploads", "1", client="")


async def test_a_put_removes_records_and_adds_a_task_together(engine: Engine) -> None:
    """A record of the same name that belongs to another client stays."""
    other = a_record(client="ada")
    await engine.put(Writes(records=(a_record(), a_record("2"), other)))
    task = a_task()
    await engine.put(Writes((task,), (a_record("3"),), removed=(a_record(), a_record("2"))))
    left = await engine.list_records("uploads", client="", after=None, limit=9)
    assert left == [a_record("3")]
    assert await engine.read_record("uploads", "1", client="ada") == other
    assert await engine.get(task.id) == task


async def test_a_repetition_of_a_put_that_removes_a_record_gets_the_first_answer(
    engine: Engine,
) -> None:
    """The record is missing then, because the first request has removed it."""
    await engine.put(Writes(records=(a_record(), a_record("2"))))
    again = Writes(removed=(a_record(),), answer=an_answer())
    outcomes = await asyncio.gather(*(engine.put(again) for _ in range(3)), return_exceptions=True)
    assert [*map(type, outcomes)] == [type(None), KeyTaken, KeyTaken]
    late = replace(again, answer=an_answer("another"))
    outcomes = await asyncio.gather(*map(engine.put, (again, late)), return_exceptions=True)
    assert [*map(type, outcomes)] == [KeyTaken, RecordNotFound]


async def test_a_refused_repetition_does_not_take_a_record_from_another_put(engine: Engine) -> None:
    """The record was written again after the first removal. All of these puts come together."""
    repeated = Writes(removed=(a_record(),), answer=an_answer())
    await engine.put(Writes(records=(a_record(),)))
    await engine.put(repeated)
    await engine.put(Writes(records=(a_record(),)))
    late = replace(repeated, answer=an_answer("another"))
    outcomes = await asyncio.gather(*map(engine.put, (repeated, late)), return_exceptions=True)
    assert [*map(type, outcomes)] == [KeyTaken, type(None)]
    with pytest.raises(RecordNotFound):
        await engine.read_record("uploads", "1", client="")


async def test_a_put_that_removes_a_missing_record_writes_nothing(engine: Engine) -> None:
    """The second record to be removed stays, and the idempotency key is still free."""
    await engine.put(Writes(records=(a_record(),)))
    task = a_task()
    with pytest.raises(RecordNotFound):
        await engine.put(
            Writes((task,), (), an_answer(), removed=(a_record(), a_record("unknown")))
        )
    with pytest.raises(TaskNotFound):
        await engine.get(task.id)
    await engine.put(Writes(answer=an_answer(), removed=(a_record(),)))


async def test_a_removal_with_a_used_idempotency_key_removes_nothing(engine: Engine) -> None:
    await engine.put(Writes((), (a_record(),), an_answer()))
    with pytest.raises(KeyTaken):
        await engine.put(Writes(answer=an_answer(), removed=(a_record(),)))
    assert await engine.read_record("uploads", "1", client="") == a_record()


async def test_only_one_of_many_concurrent_removals_of_a_record_succeeds(engine: Engine) -> None:
    await engine.put(Writes(records=(a_record(),)))
    tasks = [a_task() for _ in range(20)]
    outcomes = await asyncio.gather(
        *(engine.put(Writes((task,), removed=(a_record(),))) for task in tasks),
        return_exceptions=True,
    )
    assert Counter(map(type, outcomes)) == {type(None): 1, RecordNotFound: 19}
    assert len(await listed(engine)) == 1


async def test_a_task_may_remove_a_record_that_is_already_gone(engine: Engine) -> None:
    """The worker repeats a settlement until it is written, so the engine must not refuse it."""
    await engine.put(Writes((a_task(),), (a_record(),)))
    task = await claim_one(engine)
    removed = Writes(removed=(a_record(), a_record("unknown")))
    settled = await engine.settle(task, Outcome(Status.SUCCEEDED, follow_ups=removed), NOW)
    assert settled is not None
    with pytest.raises(RecordNotFound):
        await engine.read_record("uploads", "1", client="")


# Batches


async def a_batch_of(engine: Engine, number: int, **changes: Any) -> list[Task]:
    """Put a batch named "batch"."""
    tasks = [a_task(**changes) for _ in range(number)]
    await engine.put(Writes(in_batch("batch", *tasks)))
    return tasks


async def batch(engine: Engine, batch_id: str = "batch", *, client: str = "") -> dict[Status, int]:
    """Count the batch's tasks by status, and leave out statuses without a task."""
    counts = await engine.count_batch(batch_id, client=client)
    assert list(counts) == list(Status)
    return {status: tasks for status, tasks in counts.items() if tasks}


async def test_a_batch_is_counted_by_status(engine: Engine) -> None:
    """Only tasks that were put with the batch's id count: their follow-ups do not."""
    await put(engine, a_task(due_at=NOW + 1))
    tasks = await a_batch_of(engine, 5)
    await engine.put(Writes(in_batch("other", a_task(due_at=NOW + 1))))
    await engine.cancel(tasks[4].id, NOW)
    follow_up = Writes((a_task(due_at=NOW + 1),))
    for outcome in (Outcome(Status.SUCCEEDED, follow_ups=follow_up), Outcome(Status.RETRYING)):
        claimed = await claim_one(engine)
        await engine.settle(claimed, replace(outcome, due_at=NOW + 9), NOW)
    await claim_one(engine)
    assert await batch(engine) == dict.fromkeys(
        (Status.QUEUED, Status.RUNNING, Status.RETRYING, Status.SUCCEEDED, Status.CANCELLED), 1
    )
    assert await batch(engine, "other") == {Status.QUEUED: 1}


async def test_a_batch_of_a_thousand_tasks_is_put_whole(engine: Engine) -> None:
    tasks = await a_batch_of(engine, 1000)
    assert await batch(engine) == {Status.QUEUED: 1000}
    assert [task.id for task in await claim_all(engine)] == [task.id for task in tasks]


async def test_a_refused_batch_does_not_exist(engine: Engine) -> None:
    await engine.put(Writes(answer=an_answer()))
    with pytest.raises(KeyTaken):
        await engine.put(Writes(in_batch("batch", a_task()), answer=an_answer()))
    with pytest.raises(BatchNotFound, match="no such batch"):
        await batch(engine)


async def test_a_batch_is_found_by_its_own_client_only(engine: Engine) -> None:
    tasks = await a_batch_of(engine, 2, client="ada")
    await engine.cancel(tasks[0].id, NOW)
    await engine.purge(finished_before=NOW + 1, failed_before=NOW + 1, answered_before=0, limit=1)
    assert sum((await batch(engine, client="ada")).values()) == 2
    for stranger in ("", "eve"):
        with pytest.raises(BatchNotFound):
            await batch(engine, client=stranger)


async def test_removed_tasks_of_a_batch_count_until_its_last_task_is_removed(
    engine: Engine,
) -> None:
    """The batch's total stays true, and the batch is removed together with its last task."""
    tasks = await a_batch_of(engine, 5)
    for number, task in enumerate(tasks[:4]):
        await engine.cancel(task.id, NOW + number // 2)
    ends = {Status.CANCELLED: 4, Status.QUEUED: 1}
    for removed in (2, 2, 0):
        purging = engine.purge(
            finished_before=NOW + 1.5, failed_before=NOW + 1.5, answered_before=0, limit=2
        )
        assert await purging == removed
        assert await batch(engine) == ends
    await engine.settle(await claim_one(engine), Outcome(Status.FAILED, error="{}"), NOW + 2)
    assert await batch(engine) == {Status.CANCELLED: 4, Status.FAILED: 1}
    assert (
        await engine.purge(
            finished_before=NOW + 3, failed_before=NOW + 3, answered_before=0, limit=2
        )
        == 1
    )
    with pytest.raises(BatchNotFound):
        await batch(engine)


# Clients


async def test_a_client_is_shown_only_its_own_tasks(engine: Engine) -> None:
    """Tasks without a client, from before there were API keys, are shown to no client."""
    nobodys = a_task(id="1")
    adas = [a_task(id="2", client="ada"), a_task(id="4", client="ada", kind="save_data")]
    graces = a_task(id="3", client="grace")
    await put(engine, nobodys, *adas, graces)

    assert await listed(engine) == [nobodys]
    assert await listed(engine, client="ada") == adas[::-1]
    assert await listed(engine, client="ada", kind="save_data") == [adas[1]]
    assert await listed(engine, client="ada", status=Status.QUEUED, after="4") == [adas[0]]
    assert await listed(engine, client="grace") == [graces]
    assert await listed(engine, client="eve") == []
    assert await listed(engine, client="grace", after="4") == [graces]
    assert await listed(engine, client="eve", after="4") == []


async def test_a_client_reads_and_changes_only_its_own_records(engine: Engine) -> None:
    """Clients may use the same ids. The clean-up reads with `client=None`: any client's record."""
    records = [a_record(client=client, whose=client) for client in ("", "ada", "grace")]
    await engine.put(Writes(records=tuple(records)))

    for record in records:
        assert await engine.read_record("uploads", "1", client=record.client) == record
        page = await engine.list_records("uploads", client=record.client, after=None, limit=9)
        assert page == [record]
    assert await engine.delete_record(records[0])
    assert await engine.update_record(replace(records[1], body={"whose": "still ada's"}))
    assert await engine.read_record("uploads", "1", client="grace") == records[2]
    assert (await engine.read_record("uploads", "1", client=None)).client in {"ada", "grace"}
    for missing in (("uploads", "2"), ("data", "1")):
        with pytest.raises(RecordNotFound):
            await engine.read_record(*missing, client=None)


# Cleaning up and counting


async def test_tasks_that_finished_before_the_retention_time_are_removed(engine: Engine) -> None:
    """An unfinished task stays, however old it is."""
    old, recent, waiting = a_task(), a_task(), a_task()
    await put(engine, old, recent, waiting)
    await engine.cancel(old.id, NOW)
    await engine.cancel(recent.id, NOW + 1)
    assert (
        await engine.purge(
            finished_before=NOW + 1, failed_before=NOW + 1, answered_before=0, limit=10
        )
        == 1
    )
    assert {task.id for task in await listed(engine)} == {recent.id, waiting.id}


async def test_old_answers_are_removed(engine: Engine) -> None:
    await engine.put(Writes(answer=an_answer("old")))
    await engine.put(Writes(answer=an_answer("recent", at=NOW + 1)))
    assert (
        await engine.purge(finished_before=0, failed_before=0, answered_before=NOW + 1, limit=10)
        == 1
    )
    await engine.put(Writes(answer=an_answer("old")))
    with pytest.raises(KeyTaken):
        await engine.put(Writes(answer=an_answer("recent")))


async def test_a_purge_removes_at_most_its_limit_of_each_kind(engine: Engine) -> None:
    """Other operations must not wait long behind a large clean-up."""
    for n in range(3):
        task = a_task()
        await engine.put(Writes((task,), answer=an_answer(str(n))))
        await engine.cancel(task.id, NOW + n)
    purges = [
        await engine.purge(
            finished_before=NOW + DAY, failed_before=NOW + DAY, answered_before=NOW + DAY, limit=2
        )
        for _ in range(3)
    ]
    assert purges == [4, 2, 0]


async def test_the_backlog_says_since_when_its_oldest_task_is_due(engine: Engine) -> None:
    assert (await engine.backlog()).oldest_due_at is None
    await put(engine, a_task(at=NOW - 9, due_at=NOW - 5), a_task(at=NOW - 9))
    assert (await engine.backlog()).oldest_due_at == NOW - 9
    await claim_one(engine)
    backlog = await engine.backlog()
    assert backlog.oldest_due_at == NOW - 5
    assert (backlog.counts[Status.QUEUED], backlog.counts[Status.RUNNING]) == (1, 1)


async def test_the_latest_failures_of_a_client_come_first(engine: Engine) -> None:
    """They are sorted by the time of the failure, not by that of the acceptance."""
    tasks = [a_task(at=NOW + n, client="ada") for n in range(3)]
    await put(engine, *tasks, theirs := a_task(at=NOW + 3, client="grace"))
    failed_at = {tasks[0].id: NOW + 9, tasks[1].id: NOW + 7, theirs.id: NOW + 8}
    for task in await claim_all(engine, now=NOW + 5):
        if at := failed_at.get(task.id):
            await engine.settle(task, Outcome(Status.FAILED, error="{}"), at)
    listed = await engine.list_failed("ada", limit=9)
    assert [task.id for task in listed] == [tasks[0].id, tasks[1].id]
    assert listed == [
        replace(await engine.get(task.id), arguments="", history=None) for task in listed
    ]
    assert await engine.list_failed("ada", limit=1) == listed[:1]
    assert await engine.list_failed("", limit=9) == []


async def test_the_oldest_queued_task_of_a_client_says_since_when_it_is_due(engine: Engine) -> None:
    assert await engine.oldest_queued("ada") is None
    await put(
        engine,
        a_task(client="eve", at=NOW - 90),
        a_task(client="ada", at=NOW - 9, status=Status.RETRYING),
        a_task(client="ada", at=NOW - 7, kind="work"),
        a_task(client="ada", at=NOW - 8, due_at=NOW - 5),
    )
    assert await engine.oldest_queued("ada") == NOW - 5
    assert await engine.oldest_queued("eve") == NOW - 90
    assert await engine.oldest_queued("") is None
    for _ in range(2):
        await claim_one(engine)
    assert await engine.oldest_queued("eve") is None


async def test_the_backlog_counts_exactly_after_any_operations(engine: Engine) -> None:
    """The engine keeps the counts in a table of their own; they must not drift from the tasks."""
    dice = random.Random(1)
    statuses = [Status.SUCCEEDED, Status.FAILED, Status.RETRYING, Status.QUEUED]
    for _ in range(40):
        await put(engine, *(a_task() for _ in range(dice.randrange(5))))
        for task in (await claim(engine, limit=3)).running:
            if dice.random() < 0.7:
                await engine.settle(task, Outcome(dice.choice(statuses)), NOW)
        for task in await listed(engine, status=Status.QUEUED, limit=1):
            await engine.cancel(task.id, NOW)
        if dice.random() < 0.2:
            await claim(engine, "worker-2", limit=3, now=NOW + LEASE)
            await engine.purge(
                finished_before=NOW + 1, failed_before=NOW + 1, answered_before=0, limit=3
            )
    counted = Counter(task.status for task in await listed(engine, limit=1_000))
    backlog = await engine.backlog()
    assert {status: n for status, n in backlog.counts.items() if n} == counted


# Staying ready


async def test_a_check_passes_while_the_database_accepts_writes(engine: Engine) -> None:
    await engine.check()


async def test_new_tasks_wake_a_waiting_worker(engine: Engine) -> None:
    """Follow-ups and retried tasks wake it too."""
    waiting = asyncio.create_task(engine.wait_for_tasks(60))
    await put(engine, a_task())
    await asyncio.wait_for(waiting, 5)

    follow_up = a_task()
    outcome = Outcome(Status.SUCCEEDED, follow_ups=Writes((follow_up,)))
    waiting = asyncio.create_task(engine.wait_for_tasks(60))
    await engine.settle(await claim_one(engine), outcome, NOW)
    await asyncio.wait_for(waiting, 5)

    await engine.cancel(follow_up.id, NOW)
    waiting = asyncio.create_task(engine.wait_for_tasks(60))
    await retry(engine, follow_up.id, NOW, Writes())
    await asyncio.wait_for(waiting, 5)


async def test_a_worker_waits_no_longer_than_its_timeout(engine: Engine) -> None:
    await asyncio.wait_for(engine.wait_for_tasks(0.01), 5)
