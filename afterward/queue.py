"""The queue as the rest of the app sees it: collect, commit, look, cancel, retry."""

import time
from collections.abc import Callable, Coroutine
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar

from afterward.backlog_limit import BacklogLimit
from afterward.engine import Engine
from afterward.events import Events, EventType
from afterward.registry import Registry
from afterward.retry import RetryPolicy
from afterward.task import Task, Writes
from afterward.unit_of_work import Context, UnitOfWork

P = ParamSpec("P")
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

    async def add_task_in(
        self,
        connection: object,
        function: Callable[Concatenate[Context[ToolsT], P], Coroutine[Any, Any, Any]],
        /,
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> Task:
        """Add a task in the caller's own transaction, so that it exists exactly if the rows do.

            async with session.begin():
                session.add(order)
                await queue.add_task_in(session, send_email, recipient=order.email)

        `connection` leads to the queue's own PostgreSQL database: a connection of asyncpg, or an
        AsyncConnection or AsyncSession of SQLAlchemy on asyncpg. It is in a transaction, of any
        isolation level, or within a savepoint of one. The statement that inserts the task runs on
        that connection at once. PostgreSQL wakes the workers when the caller commits; after a
        rollback there is no task. Nothing here commits, rolls back, or changes a setting of the
        connection. Its role needs USAGE on the schema `afterward`, and INSERT on `afterward.tasks`
        and `afterward.counts`. The statement notifies the workers, and PostgreSQL does not let a
        transaction with a NOTIFY be prepared for a two-phase commit.

        Returns the task as it will be queued. The task has no request id and belongs to no client.
        The event QUEUED is never emitted for it, because only the caller knows when it commits. So
        no log line and no metric tells that it was queued; the count of the backlog includes it,
        and the events of its attempts are emitted as usual.

        Raises TypeError and ValueError as UnitOfWork.add_task does, and BacklogFull or
        QueueUnavailable because the limit on the backlog applies. In these cases nothing was sent
        through the connection, so the transaction can go on. A task that is rolled back counts as
        unfinished until the backlog is counted again, which a full backlog does at once. Raises
        TypeError for another kind of connection, and RuntimeError for a connection in no
        transaction or a queue on SQLite. The caller's connection raises its own errors, as for any
        other statement.
        """
        task = self.collect().add_task(function, *args, **kwargs)
        await self._backlog_limit.take(1)
        try:
            await self.engine.put_through(connection, task)
        finally:
            self._backlog_limit.have_put(1)
        return task

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
