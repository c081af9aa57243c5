"""The queue as the rest of the app sees it: collect, commit, look, cancel, retry."""

import time
from collections.abc import Callable
from typing import Generic, TypeVar

from afterward.backlog_limit import BacklogLimit
from afterward.engine import Engine
from afterward.events import Events, EventType
from afterward.registry import Registry
from afterward.retry import RetryPolicy
from afterward.task import Task, Writes
from afterward.unit_of_work import UnitOfWork

ToolsT = TypeVar("ToolsT")


class Queue(Generic[ToolsT]):
    """An engine, the registry of what it may run, and the events that tell of it."""

    def __init__(
        self,
        engine: Engine,
        registry: Registry[ToolsT],
        policy: RetryPolicy,
        *,
        max_backlog: int = 1_000_000,
        now: Callable[[], float] = time.time,
    ) -> None:
        self.engine = engine
        self.registry = registry
        self.policy = policy
        self.events = Events()
        self.now = now
        self.keys_in_flight: set[str] = set()
        """The idempotency keys of the requests that this process carries out just now."""
        self._backlog_limit = BacklogLimit(engine.backlog, max_backlog)

    def collect(self, request_id: str | None = None, client: str = "") -> UnitOfWork[ToolsT]:
        """Begin to collect tasks for one commit."""
        return UnitOfWork(
            self.registry,
            policy_of=self.policy_of,
            now=self.now,
            request_id=request_id,
            client=client,
        )

    def policy_of(self, kind: str) -> RetryPolicy:
        """The retry policy of this kind of task: its own, or the queue's."""
        return self.registry.policy(kind) or self.policy

    async def commit(self, writes: Writes) -> None:
        """Make what was collected a promise: it is on disk when this returns.

        Raises BacklogFull, KeyTaken, or RecordNotFound for a record that was to be removed and is
        gone: then nothing was written, nor after any QueueUnavailable but CommitUnknown. After
        CommitUnknown, or a cancellation, it may have been.
        """
        if writes.tasks or writes.records or writes.removed or writes.answer:
            await self._backlog_limit.take(len(writes.tasks))
            try:
                await self.engine.put(writes)
            finally:
                self._backlog_limit.have_put(len(writes.tasks))
            for task in writes.tasks:
                self.events.emit(EventType.QUEUED, task)

    async def cancel(self, task_id: str) -> Task:
        """Withdraw a task that waits. Raises TaskNotFound, TaskHasStarted."""
        task = await self.engine.cancel(task_id, self.now())
        self.events.emit(EventType.CANCELLED, task)
        return task

    async def retry(self, task: Task, writes: Writes) -> Task:
        """Queue a failed or cancelled task afresh, with all of its attempts or its time.

        `writes` is written with it. Raises BacklogFull, TaskNotFound, TaskNotGivenUp, KeyTaken.
        """
        now = self.now()
        bounds = self.policy_of(task.kind).bounds(now)
        await self._backlog_limit.take(1)
        try:
            task = await self.engine.retry(
                task.id,
                now,
                writes,
                max_attempts=bounds.max_attempts,
                gives_up_at=bounds.gives_up_at,
            )
        finally:
            self._backlog_limit.have_put(1)
        self.events.emit(EventType.QUEUED, task)
        return task
