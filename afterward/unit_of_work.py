"""`durable_tasks.add_task(fn, *args, **kwargs)`: the feel of BackgroundTasks, with a promise."""

from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar, cast

from afterward.registry import Registry
from afterward.retry import RetryPolicy
from afterward.task import Answer, Record, Task, Writes, new_id, to_json

P = ParamSpec("P")
ToolsT = TypeVar("ToolsT")


class UnitOfWork(Generic[ToolsT]):
    """Collects what a request, or a task, promises; committed in one transaction.

    Nothing is promised before the commit: a request that fails leaves no trace of what it added.
    """

    def __init__(
        self,
        registry: Registry[ToolsT],
        *,
        policy_of: Callable[[str], RetryPolicy],
        now: Callable[[], float],
        request_id: str | None = None,
        client: str = "",
    ) -> None:
        self._registry = registry
        self._policy_of = policy_of
        self._now = now
        self._request_id = request_id
        self._client = client
        self._tasks: list[Task] = []
        self._records: list[Record] = []
        self._removed: list[Record] = []
        self._batch_id: str | None = None

    def add_task(
        self,
        function: Callable[Concatenate["Context[ToolsT]", P], Coroutine[Any, Any, Any]],
        /,
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> Task:
        """Collect a call of `function`, which gets a Context first and then these arguments.

        Gives the task as it will be queued. Raises TypeError if the function is not in the
        registry, cannot be called like this, or an argument has no form in JSON; ValueError for
        NaN and infinities.
        """
        kind = self._registry.kind_of(function)
        # Calls it, so that wrong arguments are found now; nothing of it runs until it is awaited.
        function(cast("Context[ToolsT]", None), *args, **kwargs).close()
        now = self._now()
        bounds = self._policy_of(kind).bounds(now)
        task = Task(
            id=new_id(now),
            kind=kind,
            arguments=to_json({"args": args, "kwargs": kwargs}),
            request_id=self._request_id,
            client=self._client,
            max_attempts=bounds.max_attempts,
            gives_up_at=bounds.gives_up_at,
            created_at=now,
            updated_at=now,
            due_at=now,
        )
        self._tasks.append(task)
        return task

    def keep(self, collection: str, record_id: str, body: dict[str, Any]) -> None:
        """Collect a record, to be written together with the tasks; raises as add_task does."""
        to_json(body)
        self._records.append(Record(collection, self._client, record_id, body, self._now()))

    def remove(self, record: Record) -> None:
        """Collect the removal of a record; the commit raises RecordNotFound if it is gone."""
        self._removed.append(record)

    def as_batch(self) -> str:
        """Let the tasks collected here be one batch, which is counted as one; gives its id."""
        self._batch_id = new_id(self._now())
        return self._batch_id

    def collected(self, answer: Answer | None = None) -> Writes:
        """Everything collected so far, with the answer to keep for the request's key if any."""
        return Writes(
            tuple(self._tasks), tuple(self._records), answer, self._batch_id, tuple(self._removed)
        )


@dataclass(frozen=True, slots=True)
class Context(Generic[ToolsT]):
    """What every durable task is given as its first argument."""

    task: Task
    tools: ToolsT
    durable_tasks: UnitOfWork[ToolsT]
    """Tasks added here are committed together with this task's success, or not at all."""
    report_progress: Callable[[float], Awaitable[None]]
    """Tell how far the task is, from 0 to 1."""
