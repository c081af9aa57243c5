"""Traces of tasks with OpenTelemetry: `Afterward(url, tasks=[...], tracing=OpenTelemetry())`.

For example, a route adds `send_email`, whose first attempt fails. The second attempt succeeds, and
adds the task `write_log`:

    trace 1    POST /orders                  the span of the request, by FastAPI
                 process send_email          attempt 1, with a link to its parent
    trace 2    process send_email            attempt 2, with a link to the span of the request
                 process write_log           attempt 1 of the follow-up

Only the first attempt is part of the trace of the request. A later one may come days later, when
the trace has long been stored, so it begins a trace of its own. The link leads back to the request.
The semantic conventions ask for a link from every span that processes a message.

This module needs the package `opentelemetry-api`, which comes with FastAPI. The spans go to the
tracer provider that the application configures with `opentelemetry-sdk`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from opentelemetry.context import Context
from opentelemetry.trace import (
    Link,
    Span,
    SpanKind,
    StatusCode,
    TracerProvider,
    get_current_span,
    get_tracer,
)
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from afterward.history import error_type
from afterward.task import Outcome, Task
from afterward.tracing import Tracing

_SCHEMA = "https://opentelemetry.io/schemas/1.44.0"  # the version of the semantic conventions

_W3C = TraceContextTextMapPropagator()


class OpenTelemetry(Tracing):
    """Makes a span for each attempt, with `tracer_provider`, or with the global provider.

    The attributes are those of the semantic conventions for messaging. The destination is the kind
    of the task, the id of the message is its id, and the client is the worker. A failed attempt has
    the type of its error. No span has the arguments of a task, or the text of an error, because
    these may be confidential.
    """

    def __init__(self, tracer_provider: TracerProvider | None = None) -> None:
        self._tracer = get_tracer("afterward", tracer_provider=tracer_provider, schema_url=_SCHEMA)

    def trace_context(self) -> str | None:
        """Return the current span as a W3C traceparent, or None if there is no span."""
        carrier: dict[str, str] = {}
        _W3C.inject(carrier)
        return carrier.get("traceparent")

    @contextmanager
    def attempt(self, task: Task) -> Iterator[Callable[[Outcome], object]]:
        """Make the span of an attempt, and make it the current span."""
        request = _span_that_added(task)
        with self._tracer.start_as_current_span(
            f"process {task.kind}",
            context=request if task.claims == 1 else Context(),
            kind=SpanKind.CONSUMER,
            attributes={
                "messaging.system": "afterward",
                "messaging.operation.name": "process",
                "messaging.operation.type": "process",
                "messaging.destination.name": task.kind,
                "messaging.message.id": task.id,
                "messaging.client.id": task.owner or "",
                "afterward.task.attempt": task.attempts,
            },
            links=_links_to(request),
            record_exception=False,  # its text may be confidential
            set_status_on_exception=False,
        ) as span:
            yield partial(_record_outcome, span)


def _span_that_added(task: Task) -> Context:
    """Return a context with the span in which the task was added, or an empty context."""
    carrier = {} if task.trace_context is None else {"traceparent": task.trace_context}
    return _W3C.extract(carrier, Context())


def _links_to(request: Context) -> tuple[Link, ...]:
    span_context = get_current_span(request).get_span_context()
    return (Link(span_context),) if span_context.is_valid else ()


def _record_outcome(span: Span, outcome: Outcome) -> None:
    ended_as = outcome.status.value if outcome.counts else "given_back"
    span.set_attribute("afterward.task.outcome", ended_as)
    if outcome.counts and outcome.error is not None:
        span.set_status(StatusCode.ERROR)
        span.set_attribute("error.type", error_type(outcome.error))
