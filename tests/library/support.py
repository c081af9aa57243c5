"""Helpers for the tests of the library: a clock to set, tasks to put, a record of events."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Concatenate, ParamSpec

from afterward.engine import Engine
from afterward.engines.sqlite.engine import SQLite
from afterward.events import Event, EventType
from afterward.queue import Queue
from afterward.registry import Registry
from afterward.retry import RetryPolicy
from afterward.task import Claim, Task, Writes, new_id
from afterward.unit_of_work import Context
from afterward.worker import Worker

P = ParamSpec("P")

NOW = 1_700_000_000.0
LEASE = 30.0
# The kinds of the tasks that tests claim without a worker.
KINDS = (
    "greet",
    "finish",
    "lose",
    "only_one",
    "survive",
    "run",
    "send",
    "wait_forever",
    "fail",
    "work",
    "send_email",
    "save_data",
)
DAY = 24 * 3600.0

LONGEST_WAITS = RetryPolicy(attempts=3, base=10.0, uniform=lambda _, longest: longest)
NO_WAITS = RetryPolicy(attempts=3, base=0.0)


class Clock:
    """A clock that stands still until a test sets it."""

    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> float:
        """Return the time, in seconds since 1970."""
        return self.now


class EventRecorder:
    """Keeps all events of a queue, in order."""

    def __init__(self, queue: Queue[Any]) -> None:
        self.events: list[Event] = []
        self._written = asyncio.Event()
        queue.events.subscribe(self._write)

    @property
    def event_types(self) -> list[str]:
        """The type of each event, in words."""
        return [event.type.value for event in self.events]

    async def until(self, what: EventType, *, times: int = 1, within: float = 5.0) -> Event:
        """Wait for `times` events of the type `what`, and return the last of them."""
        async with asyncio.timeout(within):
            while len(found := [event for event in self.events if event.type is what]) < times:
                self._written.clear()
                await self._written.wait()
        return found[times - 1]

    def _write(self, event: Event) -> None:
        self.events.append(event)
        self._written.set()


def a_task(*, at: float = NOW, **changes: Any) -> Task:
    """Make a task that was accepted at this time, and is due at once."""
    task = Task(
        id=new_id(at),
        kind="greet",
        arguments='{"args":[],"kwargs":{}}',
        created_at=at,
        updated_at=at,
        due_at=at,
        max_attempts=8,
    )
    return replace(task, **changes)


@asynccontextmanager
async def opened(path: Path) -> AsyncIterator[SQLite]:
    """Start the SQLite engine on this file, and stop it at the end."""
    engine = SQLite(path)
    await engine.start()
    try:
        yield engine
    finally:
        await engine.stop()


def in_batch(batch_id: str, *tasks: Task) -> tuple[Task, ...]:
    """Return the tasks as a batch."""
    return tuple(replace(task, batch_id=batch_id) for task in tasks)


async def put(engine: Engine, *tasks: Task) -> None:
    """Put tasks, in one transaction."""
    await engine.put(Writes(tasks))


async def claim(
    engine: Engine, owner: str = "worker-1", *, limit: int = 1_000_000, now: float = NOW
) -> Claim:
    """Claim due tasks of any kind, and re-queue the tasks of other owners without a lease."""
    return await engine.claim(owner, kinds=KINDS, limit=limit, now=now, lease=LEASE)


async def claim_one(engine: Engine, owner: str = "worker-1", *, now: float = NOW) -> Task:
    """Claim the task that has been due for the longest time."""
    (task,) = (await claim(engine, owner, limit=1, now=now)).running
    return task


async def claim_all(engine: Engine, owner: str = "worker-1", *, now: float = NOW) -> list[Task]:
    """Claim every task that is due."""
    return [*(await claim(engine, owner, now=now)).running]


async def recover(engine: Engine, owner: str = "worker-2", *, now: float) -> list[Task]:
    """Re-queue the tasks of other owners whose lease has expired."""
    return [*(await claim(engine, owner, now=now)).recovered]


async def retry(engine: Engine, task_id: str, now: float, writes: Writes) -> Task:
    """Queue a failed or cancelled task again, with the bounds that `a_task` has."""
    return await engine.retry(task_id, now, writes, max_attempts=8, gives_up_at=None)


def queue_of(
    engine: Engine,
    *functions: Callable[..., Coroutine[Any, Any, Any]],
    now: Callable[[], float],
    policy: RetryPolicy = NO_WAITS,
) -> Queue[None]:
    """Make a queue with these functions in its registry."""
    return Queue(engine, Registry(*functions), policy, now=now)


async def promise(
    queue: Queue[None],
    function: Callable[Concatenate[Context[None], P], Coroutine[Any, Any, Any]],
    *args: P.args,
    **kwargs: P.kwargs,
) -> Task:
    """Add a task, commit it, and return it."""
    durable_tasks = queue.collect()
    task = durable_tasks.add_task(function, *args, **kwargs)
    await queue.commit(durable_tasks.collected())
    return task


async def wait_forever(_: Context[None]) -> None:
    """Run until the attempt is cancelled, so that a test can disturb it."""
    await asyncio.Event().wait()


@asynccontextmanager
async def working(queue: Queue[None], **settings: Any) -> AsyncIterator[Worker[None]]:
    """Run a worker inside the `async with` block."""
    worker: Worker[None] = Worker(queue, None, **settings)
    await worker.start()
    try:
        yield worker
    finally:
        await worker.stop(grace=0)
