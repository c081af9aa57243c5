"""The hook for distributed tracing. `afterward.opentelemetry` implements it with OpenTelemetry.

A trace is the work that one request causes, also in other processes. Each piece of that work is a
span, for example the request and each attempt of its tasks. So that a worker can connect an attempt
with the request, the trace context of the request is stored with each of its tasks.
"""

from abc import abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

from afterward.task import Outcome, Task


class Tracing(Protocol):
    """Connects tasks with the traces of a tracing system. Its methods must not raise."""

    @abstractmethod
    def trace_context(self) -> str | None:
        """Return the trace context of the calling code, which is stored with each new task.

        This is the value of a `traceparent` header (W3C Trace Context, section 3.2), or None if the
        calling code is in no trace.
        """

    @abstractmethod
    def attempt(self, task: Task) -> AbstractContextManager[Callable[[Outcome], object]]:
        """Return a context manager that surrounds an attempt, from the claim to the settlement.

        The task is as the worker claimed it. The value of the context manager is a function: the
        worker calls it with the outcome, once the function of the task has ended.
        """


class _NoTracing(Tracing):
    def trace_context(self) -> None:
        return None

    def attempt(self, task: Task) -> AbstractContextManager[Callable[[Outcome], object]]:  # noqa: ARG002
        return nullcontext(_ignore)


def _ignore(_: Outcome) -> None:
    pass


NO_TRACING = _NoTracing()
"""Traces nothing."""
