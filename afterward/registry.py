"""The registry of durable tasks: which functions there are, and how each is retried."""

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from afterward.retry import RetryPolicy

ToolsT = TypeVar("ToolsT")

Function = Callable[..., Coroutine[Any, Any, Any]]


@dataclass(frozen=True, slots=True)
class TaskKind:
    """A durable task function, and how it is retried where that is not the queue's own policy."""

    function: Function
    retry: RetryPolicy | None = None


class Registry(Generic[ToolsT]):
    """The kinds of durable tasks, by the names of their functions.

    The name is stored with each task, so keep it. A function alone is a kind without a policy.
    """

    def __init__(self, *kinds: Function | TaskKind) -> None:
        self._kinds: dict[str, TaskKind] = {}
        for given in kinds:
            kind = given if isinstance(given, TaskKind) else TaskKind(given)
            name = kind.function.__name__
            if not asyncio.iscoroutinefunction(kind.function):
                raise TypeError(
                    f"{name} must be `async def`; what blocks goes into asyncio.to_thread inside it"
                )
            if self._kinds.setdefault(name, kind).function is not kind.function:
                raise TypeError(f"two tasks are named {name}")

    def __iter__(self) -> Iterator[str]:
        """The names."""
        return iter(self._kinds)

    def kind_of(self, function: Function) -> str:
        """The name under which a function is stored; TypeError if it is not in the registry."""
        name = function.__name__
        if name not in self._kinds or self._kinds[name].function is not function:
            raise TypeError(f"{name} is not in the registry of tasks: name it there")
        return name

    def function(self, name: str) -> Function:
        """The function of this name. Raises KeyError if there is none."""
        return self._kinds[name].function

    def policy(self, name: str) -> RetryPolicy | None:
        """The retry policy of this kind; None if it has none of its own, or is not known here."""
        kind = self._kinds.get(name)
        return kind.retry if kind else None
