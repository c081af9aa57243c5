"""The queue: commit, cancel and retry tasks, and tell subscribers of each change."""

import asyncio
import contextlib
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar

from afterward.backlog_limit import BacklogLimit
from afterward.bulk import SLICE, Action, Slice
from afterward.circuit_breaker import LONGEST_PAUSE_SECONDS
from afterward.engine import Engine
from afterward.errors import BacklogFull
from afterward.events import Events, EventType
from afterward.filter import TaskFilter
from afterward.registry import Registry
from afterward.retry import Bounds, RetryPolicy
from afterward.task import Answer, Task, Writes, storable_text
from afterward.tracing import NO_TRACING, Tracing
from afterward.unit_of_work import Context, UnitOfWork

P = ParamSpec("P")
ToolsT = TypeVar("ToolsT")

EVENTS_AT_ONCE = 50  # then other work gets a chance to run, because each subscriber takes some time


class Queue(Generic[ToolsT]):
    """Durable tasks in one database: `engine` stores them, `registry` has their functions.

    `policy` applies to each kind of task without a policy of its own. At most `max_backlog` tasks
    may be unfinished. `now` returns seconds since the epoch. `tracing` connects the tasks with the
    traces of their requests. `events` calls the subscribers.
    """

    def __init__(
        self,
        engine: Engine,
        registry: Registry[ToolsT],
        policy: RetryPolicy,
        *,
        max_backlog: int = 1_000_000,
        now: Callable[[], float] = time.time,
        tracing: Tracing = NO_TRACING,
    ) -> None:
        self.engine = engine
        self.registry = registry
        self.policy = policy
        self.events = Events()
        self.now = now
        self.tracing = tracing
        self.keys_in_flight: set[str] = set()
        """The idempotency keys of the requests that are under way in this process."""
        self._backlog_limit = BacklogLimit(engine.backlog, max_backlog)

    def collect(self, request_id: str | None = None, client: str = "") -> UnitOfWork[ToolsT]:
        """Return an empty unit of work, to be committed with `commit`.

        Its tasks belong to `client`, and their log lines name `request_id`, up to its 255th
        character.
        """
        return UnitOfWork(
            self.registry,
            policy_of=self.policy_of,
            now=self.now,
            trace_context=self.tracing.trace_context,
            request_id=None if request_id is None else storable_text(request_id),
            client=client,
        )

    @contextlib.asynccontextmanager
    async def transaction(
        self, request_id: str | None = None, client: str = ""
    ) -> AsyncIterator[UnitOfWork[ToolsT]]:
        """Collect tasks and records in a block, and commit them together at its end.

            async with queue.transaction() as transaction:
                transaction.add_task(send_email, "ada@example.com")

        If the block raises, nothing is written. The end of the block raises as `commit` does.
        """
        unit_of_work = self.collect(request_id, client)
        yield unit_of_work
        await self.commit(unit_of_work.collected())

    def policy_of(self, kind: str) -> RetryPolicy:
        """Return the retry policy of this kind of task: its own, or the queue's."""
        return self.registry.policy(kind) or self.policy

    @property
    def longest_wait(self) -> float:
        """The longest wait before a retry, in seconds, that a policy or a pause gives."""
        policies = [self.policy, *map(self.policy_of, self.registry)]
        return max(LONGEST_PAUSE_SECONDS, *(policy.maximum for policy in policies))

    async def commit(self, writes: Writes) -> None:
        """Write a unit of work. When this returns, its tasks are on disk: they are promises.

        Raises BacklogFull, KeyTaken if the idempotency key was used before, RecordNotFound if a
        record to remove does not exist, and QueueUnavailable. After these errors nothing was
        written. CommitUnknown, a subclass of QueueUnavailable, is different: after it, and after a
        cancellation of this call, either everything was written or nothing.
        """
        if writes.tasks or writes.records or writes.removed or writes.answer:
            await self._reserve(len(writes.tasks), writes.answer)
            try:
                await self.engine.put(writes)
            finally:
                self._backlog_limit.release(len(writes.tasks))
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
        and `afterward.counts`. The transaction cannot be prepared for a two-phase commit, because
        the statement includes a NOTIFY, and PostgreSQL refuses PREPARE TRANSACTION after one.

        Returns the task as it will be queued. The task has no request id and belongs to no client.
        The event QUEUED is never emitted for it, because only the caller knows when it commits. So
        no log line and no metric tells that it was queued; the count of the backlog includes it,
        and the events of its attempts are emitted as usual.

        Raises TypeError and ValueError as UnitOfWork.add_task does, BacklogFull if too many tasks
        are unfinished, and QueueUnavailable if they cannot be counted. In these cases nothing was
        sent through the connection, so the transaction can go on. Raises TypeError for another kind
        of connection, and RuntimeError for a connection in no transaction or a queue on SQLite. The
        caller's connection raises its own errors, as for any other statement.

        After a rollback, the limit on the backlog may count the task for up to a second, until the
        next count. No task is refused because of it: a full backlog is counted again first.
        """
        task = self.collect().add_task(function, *args, **kwargs)
        await self._backlog_limit.reserve(1)
        try:
            await self.engine.put_through(connection, task)
        finally:
            self._backlog_limit.release(1)
        return task

    async def get(self, task_id: str) -> Task:
        """Return a task. Raises TaskNotFound, QueueUnavailable."""
        return await self.engine.get(task_id)

    async def cancel(self, task_id: str) -> Task:
        """Cancel a waiting task. Raises TaskNotFound, TaskHasStarted, QueueUnavailable."""
        task = await self.engine.cancel(task_id, self.now())
        self.events.emit(EventType.CANCELLED, task)
        return task

    async def run_now(self, task_id: str) -> Task:
        """Make the next attempt of a task due now. A worker begins it as soon as it has a slot.

        If the service that the task needs is away, its worker waits for the end of the pause.
        Raises TaskNotFound, TaskNotRetrying if the task does not wait for its next attempt, and
        QueueUnavailable.
        """
        task = await self.engine.run_now(task_id, self.now())
        self.events.emit(EventType.PULLED_FORWARD, task)
        return task

    async def retry(self, task: Task, answer: Answer | None = None) -> Task:
        """Queue a failed or cancelled task again, with all of its attempts or its time.

        `answer` is written in the same transaction. Raises BacklogFull, TaskNotFound,
        TaskNotGivenUp if the task is neither failed nor cancelled, KeyTaken, and QueueUnavailable.
        """
        now = self.now()
        bounds = self.policy_of(task.kind).bounds(now)
        await self._reserve(1, answer)
        try:
            task = await self.engine.retry(
                task.id,
                now,
                Writes(answer=answer),
                max_attempts=bounds.max_attempts,
                gives_up_at=bounds.gives_up_at,
            )
        finally:
            self._backlog_limit.release(1)
        self.events.emit(EventType.QUEUED, task)
        return task

    async def _reserve(self, tasks: int, answer: Answer | None) -> None:
        """Reserve places in the backlog. Raises BacklogFull.

        A repeated request needs no place, so KeyTaken is raised for it even if the backlog is full.
        """
        try:
            await self._backlog_limit.reserve(tasks)
        except BacklogFull:
            if answer is not None:
                await self.engine.check_key(answer)
            raise

    async def change_slice(
        self, task: Task, wanted: TaskFilter, *, most: int = sys.maxsize
    ) -> Slice | None:
        """Do the next slice of a bulk action: retry or cancel up to 200 tasks.

        A durable task calls this until the slice is the last one. `task` is that task, as the
        worker claimed it, and `wanted` is a filter made by TaskFilter.acted_on. All slices of the
        action together change no more than `most` tasks. Returns None if the worker has lost its
        claim; then nothing was changed.

        With fewer places than 200 in the backlog, fewer tasks are retried. Raises BacklogFull if
        there is none, and QueueUnavailable. After CommitUnknown, the next call goes on where this
        one has come to. Raises ValueError for a filter without an action.
        """
        if wanted.allows is None:
            raise ValueError("call TaskFilter.acted_on, which says what is done to the tasks")
        retries = wanted.allows is Action.RETRY
        limit = await self._backlog_limit.reserve_up_to(SLICE) if retries else SLICE
        now = self.now()

        def bounds_of(kind: str) -> Bounds:
            return self.policy_of(kind).bounds(now)

        try:
            piece = await self.engine.change_slice(
                task, wanted, limit=limit, most=most, bounds_of=bounds_of, now=now
            )
        finally:
            self._backlog_limit.release(limit if retries else 0)
        if piece is not None:
            event_type = EventType.QUEUED if retries else EventType.CANCELLED
            await self._emit_all(event_type, piece.changed)
        return piece

    async def _emit_all(self, event_type: EventType, tasks: Iterable[Task]) -> None:
        """Emit an event for each task, with pauses for other work.

        The oldest task comes first. Workers claim in this order, so STARTED comes after QUEUED.
        """
        for number, task in enumerate(sorted(tasks, key=lambda task: task.id), 1):
            self.events.emit(event_type, task)
            if number % EVENTS_AT_ONCE == 0:
                await asyncio.sleep(0)
