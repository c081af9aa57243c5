"""The unit of work: tasks and records that are collected, and then committed together."""

from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, replace
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar, cast

from afterward.registry import Registry
from afterward.retry import RetryPolicy
from afterward.signature import to_strict_json
from afterward.task import Answer, Record, Task, Writes, new_id
from afterward.tracing import NO_TRACING, read_trace_context

P = ParamSpec("P")
ToolsT = TypeVar("ToolsT")


class UnitOfWork(Generic[ToolsT]):
    """Collects the tasks and records of a request or of a task, for one transaction.

    Nothing is written before the commit. If the request fails first, nothing of it remains.
    """

    def __init__(
        self,
        registry: Registry[ToolsT],
        *,
        policy_of: Callable[[str], RetryPolicy],
        now: Callable[[], float],
        trace_context: Callable[[], str | None] = NO_TRACING.trace_context,
        request_id: str | None = None,
        client: str = "",
    ) -> None:
        self._registry = registry
        self._policy_of = policy_of
        self._now = now
        self._trace_context = trace_context
        self._request_id = request_id
        self._client = client
        self._tasks: list[Task] = []
        self._records: list[Record] = []
        self._removed: list[Record] = []
        self._is_open = True  # until its writes are taken for the commit
        self._batch_id: str | None = None

    def add_task(
        self,
        function: Callable[Concatenate["Context[ToolsT]", P], Coroutine[Any, Any, Any]],
        /,
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> Task:
        """Collect a call of `function`, which gets a Context and then these arguments.

        Returns the task as it will be queued. The arguments are stored as JSON, so a tuple comes
        back as a list. For a parameter that is annotated with another type, such as a pydantic
        model, the worker makes a value of this type again. Raises TypeError if the function is not
        in the registry, cannot be called like this, or an argument has no JSON form, such as a dict
        with a key that is not a str; ValueError for NaN and infinities, and for an argument that
        does not fit its annotation or cannot be restored from JSON.
        """
        self._check_open()
        kind = self._registry.kind_of(function)
        # Calling an async function checks its arguments and runs nothing. The coroutine is closed.
        function(cast("Context[ToolsT]", None), *args, **kwargs).close()
        arguments = self._registry.signature(kind).encode(args, kwargs)
        now = self._now()
        bounds = self._policy_of(kind).bounds(now)
        task = Task(
            id=new_id(now),
            kind=kind,
            arguments=arguments,
            request_id=self._request_id,
            trace_context=read_trace_context(self._trace_context),
            about=self._registry.about(kind, args, kwargs),
            batch_id=self._batch_id,
            client=self._client,
            max_attempts=bounds.max_attempts,
            gives_up_at=bounds.gives_up_at,
            created_at=now,
            updated_at=now,
            due_at=now,
        )
        self._tasks.append(task)
        return task

    def add_record(self, collection: str, record_id: str, body: dict[str, Any]) -> None:
        """Collect a record, which replaces the client's record of this id if there is one.

        Raises TypeError if `body` has no JSON form, ValueError for NaN and infinities.
        """
        self._check_open()
        to_strict_json(body)  # only to raise its errors now
        self._records.append(Record(collection, self._client, record_id, body, self._now()))

    def remove_record(self, record: Record) -> None:
        """Collect the removal of a record. The commit raises RecordNotFound if it is gone."""
        self._check_open()
        self._removed.append(record)

    def as_batch(self) -> str:
        """Make all tasks of this unit of work one batch. Returns the id of the batch.

        It is best called before the first task, because it copies the tasks that are there already.
        """
        self._check_open()
        self._batch_id = new_id(self._now())
        self._tasks = [replace(task, batch_id=self._batch_id) for task in self._tasks]
        return self._batch_id

    def collected(self, answer: Answer | None = None) -> Writes:
        """Return everything that was collected, for `Queue.commit`.

        `answer` is the response to store for the request's idempotency key, if it has one. After
        this, adding to the unit of work raises RuntimeError, because it would be lost.
        """
        self._is_open = False
        return Writes(tuple(self._tasks), tuple(self._records), answer, tuple(self._removed))

    def _check_open(self) -> None:
        if not self._is_open:
            raise RuntimeError(
                "this unit of work has been taken for its commit, so what is added now would be "
                "lost. Add tasks before the route, the task or the block ends, not in "
                "BackgroundTasks or while a response streams"
            )


@dataclass(frozen=True, slots=True)
class Context(Generic[ToolsT]):
    """The first argument of every durable task."""

    task: Task
    """The task as the worker claimed it: its `id`, and its `attempts` with this attempt."""
    tools: ToolsT
    """The objects that this process gives to its tasks, for example an SMTP client."""
    durable_tasks: UnitOfWork[ToolsT]
    """The unit of work of this attempt, committed with the task's success, else dropped."""
    report_progress: Callable[[float], Awaitable[None]]
    """Store the progress of the task, from 0 to 1, and tell the subscribers.

    A number below 0 counts as 0, and one above 1 as 1. Raises ValueError for NaN.
    """
