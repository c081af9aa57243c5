"""The hook for distributed tracing. `afterward.opentelemetry` implements it with OpenTelemetry.

A trace is the work that one request causes, also in other processes. Each piece of that work is a
span, for example the request and each attempt of its tasks. So that a worker can connect an attempt
with the request, the trace context of the request is stored with each of its tasks.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from typing import Protocol

import structlog

from afterward.task import Outcome, Task

log = structlog.get_logger(__name__)


class Tracing(Protocol):
    """Connects tasks with the traces of a tracing system.

    An error that a method raises is logged, and the request or the attempt goes on without a span.
    """

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


def read_trace_context(trace_context: Callable[[], str | None]) -> str | None:
    """Return what `Tracing.trace_context` returns; None if it raises."""
    try:
        return trace_context()
    except Exception as error:  # noqa: BLE001 -- it is the application's code, and may raise any error
        _log(error)
        return None


def trace_attempt(
    tracing: Tracing, task: Task
) -> AbstractContextManager[Callable[[Outcome], object]]:
    """Surround an attempt with `tracing.attempt(task)`, whose errors do not get out.

    For example, OpenTelemetry passes on an error of the application's sampler. Without the guard,
    the attempt would never be settled. An error of the surrounded code passes as it is.
    """
    # The guard costs 5 µs, so an application without tracing does not pay for it.
    return NO_TRACING.attempt(task) if tracing is NO_TRACING else _guarded_attempt(tracing, task)


@contextmanager
def _guarded_attempt(tracing: Tracing, task: Task) -> Iterator[Callable[[Outcome], object]]:
    span = ExitStack()
    trace_outcome: Callable[[Outcome], object] = _ignore
    with _guarded():
        trace_outcome = span.enter_context(tracing.attempt(task))

    def trace_guarded(outcome: Outcome) -> None:
        with _guarded():
            trace_outcome(outcome)

    try:
        yield trace_guarded
    except BaseException as error:
        with _guarded():
            span.__exit__(type(error), error, error.__traceback__)
        raise
    with _guarded():
        span.close()


@contextmanager
def _guarded() -> Iterator[None]:
    """Log an error of the tracing, and go on."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 -- as above
        _log(error)


def _log(error: Exception) -> None:
    with suppress(Exception):  # the disk of the log may be full
        log.error("the tracing fails", exc_info=error)
