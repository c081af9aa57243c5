"""The model test: after any operations in any order, an engine holds the same as a plain dict.

Hypothesis chooses the operations. Each runs on the engine and on a dict of tasks, the model.
"""

import asyncio
import contextlib
import json
from collections import Counter
from collections.abc import Coroutine
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    MultipleResults,
    RuleBasedStateMachine,
    consumes,
    invariant,
    multiple,
    precondition,
    rule,
    run_state_machine_as_test,
)

from afterward.bulk import Action
from afterward.engine import Engine
from afterward.errors import (
    BatchNotFound,
    TaskHasStarted,
    TaskNotFound,
    TaskNotGivenUp,
    TaskNotRetrying,
)
from afterward.filter import TaskFilter
from afterward.history import MOST_KEPT
from afterward.retry import MAX_CRASHES, WORKER_DIED, Bounds
from afterward.task import FINISHED, GIVEN_UP, WAITING, Outcome, Status, Task, Writes
from tests.library import time_machine
from tests.library.support import KINDS, LEASE, NOW, a_task, in_batch
from tests.support.torture import LONG, form

KIND = st.sampled_from(KINDS[:3])
BOUNDS = st.none() | st.integers(1, 5)
OWNERS = st.sampled_from(["worker-1", "worker-2"])
ENDINGS = st.sampled_from([Status.SUCCEEDED, Status.FAILED, Status.RETRYING, Status.QUEUED])

EXAMPLES = settings(
    max_examples=form(60, 400),
    stateful_step_count=form(40, 100),
    deadline=None,
    derandomize=not LONG,
    database=None,
)


def test_an_engine_behaves_like_a_dict(engine_url: str) -> None:
    with asyncio.Runner() as runner:
        engine = time_machine.opened(engine_url)
        runner.run(engine.start())
        run_state_machine_as_test(
            lambda: _EngineMachine(runner, engine),  # type: ignore[arg-type]
            settings=EXAMPLES,
        )
        runner.run(engine.stop())


def without_history(value: Any) -> Any:
    """Return a task without its history; also the tasks of a list."""
    match value:
        case Task():
            return replace(value, history=None)
        case list():
            return type(value)(map(without_history, value))
    return value


class _EngineMachine(RuleBasedStateMachine):
    """Runs each operation on an engine and on the model, and compares the two."""

    ids = Bundle[str]("ids")
    claims = Bundle[Task]("claims")

    def __init__(self, runner: asyncio.Runner, engine: Engine) -> None:
        super().__init__()
        self.runner = runner
        self.engine = engine
        self.model: dict[str, Task] = {}
        self.leases: dict[str, float] = {}
        self.batches: dict[str, list[str]] = {}
        self.removed: dict[str, Status] = {}
        self.failures = Counter[str]()  # failed attempts of each task
        self.actions: dict[str, tuple[str, int]] = {}  # the cursor and the count of each action
        self.now = NOW

    def ask(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Run a method of the engine. Histories are left out: an invariant counts them."""
        return without_history(self.runner.run(work))

    @rule(seconds=st.sampled_from([1.0, LEASE]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    # Few tasks, so that each goes through many changes.
    @precondition(lambda self: len(self.model) < 3)
    @rule(target=ids, wait=st.sampled_from([0.0, 5.0]), kind=KIND, max_attempts=BOUNDS)
    def put(self, wait: float, kind: str, max_attempts: int | None) -> str:
        task = a_task(at=self.now, kind=kind, due_at=self.now + wait, max_attempts=max_attempts)
        self.ask(self.engine.put(Writes((task,))))
        self.model[task.id] = task
        return task.id

    @precondition(lambda self: len(self.model) < 2)
    @rule(target=ids, number=st.integers(1, 2))
    def put_batch(self, number: int) -> MultipleResults[str]:
        batch_id = f"batch {len(self.batches):03}"
        tasks = in_batch(batch_id, *(a_task(at=self.now) for _ in range(number)))
        self.ask(self.engine.put(Writes(tasks)))
        self.model |= {task.id: task for task in tasks}
        self.batches[batch_id] = [task.id for task in tasks]
        return multiple(*self.batches[batch_id])

    @rule(
        target=claims,
        owner=OWNERS,
        kinds=st.lists(KIND, unique=True),
        limit=st.integers(1, 3),
        suspect=st.booleans(),
        silence=st.sampled_from([0, LEASE]),
    )
    def claim(
        self, owner: str, kinds: list[str], limit: int, suspect: bool, silence: float
    ) -> MultipleResults[Task]:
        self.now += silence
        self.extend(owner)  # because a worker that claims has sent its heartbeats
        # The model knows which tasks may be claimed, and which leases have expired.
        due = {
            task.id: task
            for task in self.tasks_with_status(*WAITING)
            if task.kind in kinds and (task.due_at <= task.updated_at or task.due_at <= self.now)
        }
        silent = {
            task.id: task
            for task in self.tasks_with_status(Status.RUNNING)
            if task.owner != owner and self.leases[task.id] <= self.now
        }
        claimed = self.runner.run(
            self.engine.claim(
                owner, kinds=kinds, limit=limit, suspect=suspect, now=self.now, lease=LEASE
            )
        )
        running = claimed.running
        for task in running:
            self.begin(due.pop(task.id), owner)
            assert without_history(task) == self.model[task.id]
        for task in claimed.recovered:
            self.record_crash(silent.pop(task.id))
            assert without_history(task) == self.model[task.id]
        # The claim takes at most `limit` tasks, and at most one crashed task.
        assert len(running) <= limit
        assert len([task for task in running if task.crashes]) <= suspect
        # It may leave some for the next claim, but it may not come back with none.
        # It may leave some for the next claim, but it may not come back with none.
        left = [task for task in (due | silent).values() if suspect or not task.crashes]
        assert running or claimed.recovered or not left
        # Among the crashed tasks, and among the others, the tasks that are due first come first.
        assert [task.due_at for task in running] == sorted(task.due_at for task in running)
        for suspects in (True, False):
            begun = [task.due_at for task in running if bool(task.crashes) is suspects]
            waits = [task.due_at for task in due.values() if bool(task.crashes) is suspects]
            assert not (begun and waits) or max(begun) <= min(waits)
        return multiple(*running)

    def begin(self, task: Task, owner: str) -> None:
        self.leases[task.id] = self.now + LEASE
        self.change(
            task.id,
            status=Status.RUNNING,
            attempts=task.attempts + 1,
            claims=task.claims + 1,
            owner=owner,
            started_at=self.now,
        )

    def record_crash(self, task: Task) -> None:
        last = task.max_attempts is not None and task.attempts >= task.max_attempts
        hopeless = task.crashes + 1 == MAX_CRASHES or last
        self.change(
            task.id,
            status=Status.FAILED if hopeless else Status.RETRYING,
            crashes=task.crashes + 1,
            due_at=self.now,
            finished_at=self.now if hopeless else None,
            error=WORKER_DIED,
        )
        self.failures[task.id] += 1

    @rule(owner=OWNERS)
    def extend(self, owner: str) -> None:
        running = self.tasks_with_status(Status.RUNNING)
        mine = {(task.id, task.claims) for task in running if task.owner == owner}
        self.leases |= dict.fromkeys((task_id for task_id, _ in mine), self.now + LEASE)
        assert self.ask(self.engine.extend(owner, now=self.now, lease=LEASE)) == mine

    @rule(claimed=claims, progress=st.sampled_from([0.0, 0.5]))
    def report(self, claimed: Task, progress: float) -> None:
        held = self.holds(claimed)
        if held:
            self.change(claimed.id, progress=progress)
        reported = self.ask(self.engine.report(claimed, progress, self.now))
        assert reported == (self.model[claimed.id] if held else None)

    @rule(claimed=consumes(claims), ending=ENDINGS, counts=st.booleans(), unexpected=st.booleans())
    def settle(self, claimed: Task, ending: Status, counts: bool, unexpected: bool) -> None:
        # Time passes, because PostgreSQL takes an outcome of the same moment for a repetition.
        self.now += 0.25
        held = self.holds(claimed)
        if held:
            self.change(
                claimed.id,
                status=ending,
                attempts=claimed.attempts - (not counts),
                errors=claimed.errors + unexpected,
                crashes=0 if counts else self.model[claimed.id].crashes,
                due_at=self.now,
                finished_at=self.now if ending in FINISHED else None,
                result="1",
                error="{}",
            )
            self.failures[claimed.id] += counts
        outcome = Outcome(
            ending,
            due_at=self.now,
            result="1",
            error="{}",
            counts=counts,
            unexpected=unexpected,
        )
        settled = self.ask(self.engine.settle(claimed, outcome, self.now))
        assert settled == (self.model[claimed.id] if held else None)

    @rule(task_id=ids)
    def cancel(self, task_id: str) -> None:
        refusal = self.refusal(task_id, WAITING, TaskHasStarted)
        if self.done(self.engine.cancel(task_id, self.now), refusal):
            self.change(task_id, status=Status.CANCELLED, finished_at=self.now)

    @rule(task_id=ids, max_attempts=BOUNDS)
    def retry(self, task_id: str, max_attempts: int | None) -> None:
        refusal = self.refusal(task_id, GIVEN_UP, TaskNotGivenUp)
        gives_up_at = None if max_attempts else self.now + 9
        retrying = self.engine.retry(
            task_id, self.now, Writes(), max_attempts=max_attempts, gives_up_at=gives_up_at
        )
        if self.done(retrying, refusal):
            self.begin_anew(task_id, max_attempts, gives_up_at)

    def begin_anew(self, task_id: str, max_attempts: int | None, gives_up_at: float | None) -> None:
        self.change(
            task_id,
            max_attempts=max_attempts,
            gives_up_at=gives_up_at,
            status=Status.QUEUED,
            attempts=0,
            errors=0,
            crashes=0,
            due_at=self.now,
            started_at=None,
            finished_at=None,
            progress=None,
            result=None,
            error=None,
        )

    @rule(task_id=ids)
    def run_now(self, task_id: str) -> None:
        refusal = self.refusal(task_id, (Status.RETRYING,), TaskNotRetrying)
        if self.done(self.engine.run_now(task_id, self.now), refusal):
            self.change(task_id, due_at=self.now)

    @rule(claimed=claims, action=st.sampled_from(Action), limit=st.integers(1, 2))
    def change_slice(self, claimed: Task, action: Action, limit: int) -> None:
        """Let any running task act as the durable task of a bulk action."""
        cursor, done = self.actions.get(claimed.id, ("~", 0))
        below = [task_id for task_id in self.model if task_id < cursor][::-1]
        found = [task_id for task_id in below if self.model[task_id].status in action.statuses]
        piece = self.runner.run(
            self.engine.change_slice(
                claimed,
                TaskFilter().acted_on(action, self.now),
                limit=limit,
                most=1_000,
                bounds_of=lambda _: Bounds(max_attempts=5),
                now=self.now,
            )
        )
        if not self.holds(claimed):
            assert piece is None
            return
        changed, is_last = found[:limit], len(found) <= limit
        self.model[claimed.id] = replace(self.model[claimed.id], crashes=0)
        for task_id in changed:
            if action is Action.RETRY:
                self.begin_anew(task_id, 5, None)
            else:
                self.change(task_id, status=Status.CANCELLED, finished_at=self.now)
        self.actions[claimed.id] = changed[-1] if changed else cursor, done + len(changed)
        assert piece is not None
        assert {task.id for task in piece.changed} == set(changed)
        assert (piece.done, piece.is_last) == (done + len(changed), is_last)

    @rule()
    def purge(self) -> None:
        old = [
            task for task in self.tasks_with_status(*FINISHED) if (task.finished_at or 0) < self.now
        ]
        for task in old:
            self.removed[task.id] = self.model.pop(task.id).status
        purging = self.engine.purge(
            finished_before=self.now, failed_before=self.now, answered_before=0, limit=1_000
        )
        assert self.ask(purging) == len(old)

    @invariant()
    def both_hold_the_same(self) -> None:
        listing = self.engine.list_tasks(TaskFilter(), limit=1_000)
        tasks = [replace(task, arguments="") for task in self.model.values()]
        assert self.ask(listing) == tasks[::-1]

    @invariant()
    def each_failed_attempt_is_in_the_history(self) -> None:
        for task_id in self.model:
            history = self.runner.run(self.engine.get(task_id)).history
            attempts = json.loads(history or "[]")
            assert len(attempts) == min(self.failures[task_id], MOST_KEPT)

    @invariant()
    def both_count_the_same(self) -> None:
        backlog = self.ask(self.engine.backlog())
        counts = Counter(task.status for task in self.model.values())
        assert backlog.counts == {status: counts[status] for status in Status}
        due = [task.due_at for task in self.tasks_with_status(*WAITING)]
        assert backlog.oldest_due_at == min(due, default=None)

    @invariant()
    def both_list_the_same_changes(self) -> None:
        for since in (self.now, self.now - LEASE):
            listing = self.engine.list_changed("", since=since, now=self.now, limit=1_000)
            changed = [task for task in self.model.values() if task.updated_at >= since]
            changed.sort(key=lambda task: (task.updated_at, task.id))
            assert self.ask(listing) == [replace(task, arguments="") for task in changed]

    @invariant()
    def both_list_the_same_batches(self) -> None:
        there = [
            batch_id for batch_id, tasks in self.batches.items() if self.model.keys() & set(tasks)
        ]
        assert self.ask(self.engine.list_batches("", limit=1_000)) == there[::-1]

    @invariant()
    def both_know_the_same_of_each_batch(self) -> None:
        for batch_id, tasks in self.batches.items():
            there = self.model.keys() & set(tasks)
            with contextlib.nullcontext() if there else pytest.raises(BatchNotFound):
                counts = Counter(
                    self.model[task].status if task in there else self.removed[task]
                    for task in tasks
                )
                expected = {status: counts[status] for status in Status}
                assert self.ask(self.engine.count_batch(batch_id, client="")) == expected

    def teardown(self) -> None:
        """Leave the engine empty for the next example, even if it differs from the model."""
        listing = self.engine.list_tasks(TaskFilter(), limit=1_000)
        for task in self.ask(listing):
            if task.status in WAITING:
                self.ask(self.engine.cancel(task.id, self.now))
            elif task.status is Status.RUNNING:
                self.ask(self.engine.settle(task, Outcome(Status.SUCCEEDED), self.now))
        self.ask(
            self.engine.purge(
                finished_before=self.now + 1,
                failed_before=self.now + 1,
                answered_before=0,
                limit=1_000,
            )
        )

    # The model

    def tasks_with_status(self, *statuses: Status) -> list[Task]:
        return [task for task in self.model.values() if task.status in statuses]

    def holds(self, claimed: Task) -> bool:
        task = self.model.get(claimed.id)
        return task is not None and task.status is Status.RUNNING and task.claims == claimed.claims

    def change(self, task_id: str, **changes: Any) -> None:
        self.model[task_id] = replace(self.model[task_id], updated_at=self.now, **changes)

    def refusal(
        self, task_id: str, allowed: tuple[Status, ...], otherwise: type[Exception]
    ) -> type[Exception] | None:
        if task_id not in self.model:
            return TaskNotFound
        return None if self.model[task_id].status in allowed else otherwise

    def done(self, asking: Coroutine[Any, Any, Task], refusal: type[Exception] | None) -> bool:
        with pytest.raises(refusal) if refusal else contextlib.nullcontext():
            self.ask(asking)
        return refusal is None
