"""The registry: the functions that may run as durable tasks, and their retry policies."""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from afterward.filter import storable_about
from afterward.retry import RetryPolicy
from afterward.signature import Function, Signature

ToolsT = TypeVar("ToolsT")


@dataclass(frozen=True, slots=True)
class TaskKind:
    """A function of durable tasks, with a retry policy of its own instead of the queue's.

    `about` names a parameter of the function. Its value is stored with each task, so that people
    find the tasks that are about it: all mails to a recipient, all tasks of an upload.

    An `urgent` task begins before all other tasks that are due, also when it is retried. For
    example, a task that cancels waiting tasks would come too late behind them.
    """

    function: Function
    retry: RetryPolicy | None = None
    about: str | None = None
    urgent: bool = False


class Registry(Generic[ToolsT]):
    """The kinds of durable tasks, by the names of their functions.

    Each stored task names its function, so do not rename a function while tasks of its kind wait. A
    function without a TaskKind has the queue's retry policy. Raises TypeError for a function that
    is not `async def` or takes no context, for annotations that cannot be resolved, and for two
    functions of one name.
    """

    def __init__(self, *kinds: Function | TaskKind) -> None:
        self._kinds: dict[str, TaskKind] = {}
        self._signatures: dict[str, Signature] = {}
        for given in kinds:
            kind = given if isinstance(given, TaskKind) else TaskKind(given)
            name = _name_of(kind.function)
            if not inspect.iscoroutinefunction(kind.function):
                raise TypeError(
                    f"{name} must be `async def`; inside it, run blocking calls with "
                    "asyncio.to_thread"
                )
            if kind.retry is not None and not isinstance(kind.retry, RetryPolicy):
                raise TypeError(f"{name}: retry must be a RetryPolicy")
            if self._kinds.setdefault(name, kind) != kind:
                raise TypeError(f"two tasks are named {name}")
            self._signatures[name] = signature = Signature(kind.function)
            if kind.about is not None and kind.about not in signature.defaults:
                raise TypeError(f"{name} has no parameter `{kind.about}` for `about`")
        self.urgent = frozenset(name for name, kind in self._kinds.items() if kind.urgent)
        """The kinds whose tasks begin before the tasks of other kinds."""

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names of the kinds."""
        return iter(self._kinds)

    def kind_of(self, function: Function) -> str:
        """Return the name of a function's kind. Raises TypeError if it is not in the registry."""
        name = _name_of(function)
        # Not `is`: each access to a method of an object makes another bound method.
        if name not in self._kinds or self._kinds[name].function != function:
            raise TypeError(
                f"{name} is not in the registry of tasks: name it in the tasks of your Afterward "
                "or Registry"
            )
        return name

    def signature(self, name: str) -> Signature:
        """Return the function of this kind, with its types. Raises KeyError if there is none."""
        return self._signatures[name]

    def about(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str | None:
        """Return the text to store as `about` for a call of this kind, or None."""
        about = self._kinds[name].about
        if about is None:
            return None
        return storable_about(self._signatures[name].argument(about, args, kwargs))

    def policy(self, name: str) -> RetryPolicy | None:
        """Return the retry policy of this kind; None if it has none of its own, or is unknown."""
        kind = self._kinds.get(name)
        return kind.retry if kind else None


def _name_of(function: Function) -> str:
    """Return the name under which tasks are stored. Raises TypeError for a thing without one."""
    name = getattr(function, "__name__", None)
    if not isinstance(name, str):
        raise TypeError(
            f"{function!r} has no name to be stored under: write an `async def` that calls it"
        )
    return name
