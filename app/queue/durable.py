"""`durable_tasks.add_task(fn, *args, **kwargs)`: the feel of BackgroundTasks, with a promise."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from dataclasses import dataclass
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar, cast

from app.queue.task import Answer, Record, Task, Writes, new_id, to_json

P = ParamSpec("P")
ToolsT = TypeVar("ToolsT")


class DurableTasks(Generic[ToolsT]):
    """Collects what a request, or a task, promises; committed in one transaction.

    Nothing is promised before the commit: a request that fails leaves no trace of what it added.
    """

    def __init__(
        self,
        catalogue: "Catalogue[ToolsT]",
        *,
        max_attempts: int,
        now: Callable[[], float],
        request_id: str | None = None,
        client: str = "",
    ) -> None:
        self._catalogue = catalogue
        self._max_attempts = max_attempts
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
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> Task:
        """Collect a call of `function`, which gets a Context first and then these arguments.

        Gives the task as it will be queued. Raises TypeError if the function is not in the
        catalogue, cannot be called like this, or an argument has no form in JSON; ValueError for
        NaN and infinities.
        """
        kind = self._catalogue.kind_of(function)
        # Calls it, so that wrong arguments are found now; nothing of it runs until it is awaited.
        function(cast("Context[ToolsT]", None), *args, **kwargs).close()
        now = self._now()
        task = Task(
            id=new_id(now),
            kind=kind,
            arguments=to_json({"args": args, "kwargs": kwargs}),
            request_id=self._request_id,
            client=self._client,
            max_attempts=self._max_attempts,
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
    durable_tasks: DurableTasks[ToolsT]
    """Tasks added here are committed together with this task's success, or not at all."""
    report_progress: Callable[[float], Awaitable[None]]
    """Tell how far the task is, from 0 to 1."""


class Catalogue(Generic[ToolsT]):
    """The durable task functions, by name. The name is what is stored: keep it."""

    def __init__(self, *functions: Callable[..., Coroutine[Any, Any, Any]]) -> None:
        self._functions: dict[str, Callable[..., Coroutine[Any, Any, Any]]] = {}
        for function in functions:
            name = function.__name__
            if not asyncio.iscoroutinefunction(function):
                raise TypeError(
                    f"{name} must be `async def`; what blocks goes into asyncio.to_thread inside it"
                )
            if self._functions.setdefault(name, function) is not function:
                raise TypeError(f"two tasks are named {name}")

    def __iter__(self) -> Iterator[str]:
        """The names."""
        return iter(self._functions)

    def kind_of(self, function: Callable[..., Coroutine[Any, Any, Any]]) -> str:
        """The name under which a function is stored; TypeError if it is not in the catalogue."""
        kind = function.__name__
        if self._functions.get(kind) is not function:
            raise TypeError(f"{kind} is not in the catalogue of tasks: name it there")
        return kind

    def function(self, kind: str) -> Callable[..., Coroutine[Any, Any, Any]] | None:
        """The function of this name, if there is one."""
        return self._functions.get(kind)
