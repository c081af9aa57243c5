"""Traces with OpenTelemetry: the spans of attempts, and their places in traces."""

import asyncio
import subprocess
import sys
from collections.abc import Callable, Coroutine, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, Sampler, SamplingResult
from opentelemetry.trace import SpanKind, StatusCode, get_current_span
from structlog.testing import capture_logs

from afterward import Afterward, Context, Task, TemporaryError
from afterward.engine import Engine
from afterward.errors import PermanentError
from afterward.events import EventType
from afterward.opentelemetry import OpenTelemetry
from afterward.queue import Queue
from afterward.registry import Registry
from afterward.task import Outcome, Status
from afterward.tracing import Tracing, trace_attempt
from afterward.worker import Worker
from tests.library.support import NO_WAITS, Clock, EventRecorder, a_task, opened, put, working
from tests.support.spans import Spans, attributes_of, id_of

pytestmark = pytest.mark.anyio

ADDRESS = "ada@example.com"


async def send(_: Context[None], address: str) -> None:
    """Succeed."""


async def send_after_a_failure(context: Context[None], address: str) -> None:
    """Fail at the first attempt."""
    if context.task.attempts == 1:
        raise TemporaryError(f"try again: {address}")


async def fail(_: Context[None], address: str) -> None:
    """Fail for good."""
    raise PermanentError(f"no such user: {address}")


async def send_two(context: Context[None], address: str) -> None:
    """Add a follow-up, and succeed."""
    context.durable_tasks.add_task(send, address)


async def wait(_: Context[None], address: str) -> None:
    """Run until the attempt is cancelled."""
    await asyncio.Event().wait()


async def cancel_itself(_: Context[None], address: str) -> None:
    """Cancel the asyncio task of the attempt, but return before that has an effect."""
    current = asyncio.current_task()
    assert current is not None
    current.cancel()


@pytest.fixture
def spans() -> Spans:
    return Spans()


def traced(engine: Engine, spans: Spans, clock: Clock) -> Queue[None]:
    functions = send, send_after_a_failure, fail, send_two, wait, cancel_itself
    tracing = OpenTelemetry(spans.provider)
    return Queue(engine, Registry(*functions), NO_WAITS, now=clock, tracing=tracing)


@pytest.fixture
def queue(engine: Engine, spans: Spans, clock: Clock) -> Queue[None]:
    return traced(engine, spans, clock)


async def add(
    queue: Queue[None], function: Callable[..., Coroutine[Any, Any, None]] = send
) -> Task:
    async with queue.transaction() as transaction:
        return transaction.add_task(function, ADDRESS)


async def run(queue: Queue[None]) -> None:
    await Worker(queue, None).run_until_idle()


def is_own_trace(attempt: ReadableSpan) -> bool:
    return attempt.parent is None


def linked_ids(attempt: ReadableSpan) -> list[int]:
    """Return the ids of the spans to which a span has links."""
    return [link.context.span_id for link in attempt.links]


# The attempts of a task


async def test_the_first_attempt_is_a_child_of_the_span_that_added_the_task(
    queue: Queue[None], spans: Spans
) -> None:
    with spans.request() as request:
        task = await add(queue)
    await run(queue)
    (attempt,) = spans.named("process send")
    assert attempt.parent is not None
    assert attempt.parent.span_id == request.span_id
    assert id_of(attempt).trace_id == request.trace_id
    assert linked_ids(attempt) == [request.span_id]
    assert attempt.kind is SpanKind.CONSUMER
    assert attempt.status.status_code is StatusCode.UNSET
    assert attributes_of(attempt) == {
        "messaging.system": "afterward",
        "messaging.operation.name": "process",
        "messaging.operation.type": "process",
        "messaging.destination.name": "send",
        "messaging.message.id": task.id,
        "messaging.client.id": (await queue.get(task.id)).owner,
        "afterward.task.attempt": 1,
        "afterward.task.outcome": "succeeded",
    }


async def test_a_retry_is_a_trace_of_its_own_with_a_link_to_that_span(
    queue: Queue[None], spans: Spans
) -> None:
    with spans.request() as request:
        await add(queue, send_after_a_failure)
    await run(queue)
    first, second = spans.named("process send_after_a_failure")
    assert id_of(first).trace_id == request.trace_id
    assert is_own_trace(second)
    assert id_of(second).trace_id != request.trace_id
    assert linked_ids(second) == [request.span_id]
    assert [attributes_of(span)["afterward.task.attempt"] for span in (first, second)] == [1, 2]


async def test_a_task_that_a_client_retries_is_a_trace_of_its_own_too(
    queue: Queue[None], spans: Spans
) -> None:
    """Its attempts are counted from 1 again, perhaps days after the request."""
    with spans.request() as request:
        task = await add(queue, fail)
    await run(queue)
    await queue.retry(await queue.get(task.id))
    await run(queue)
    _, retried = spans.named("process fail")
    assert attributes_of(retried)["afterward.task.attempt"] == 1
    assert is_own_trace(retried)
    assert linked_ids(retried) == [request.span_id]


async def test_the_trace_context_survives_a_restart(tmp_path: Path, clock: Clock) -> None:
    before, after = Spans(), Spans()
    async with opened(tmp_path / "queue.db") as engine:
        queue = traced(engine, before, clock)
        recorder = EventRecorder(queue)
        with before.request() as request:
            await add(queue)
            await add(queue, wait)
        async with working(queue):
            await recorder.until(EventType.STARTED, times=2)
    assert [attributes_of(s)["afterward.task.outcome"] for s in before.named("process wait")] == [
        "given_back"
    ]
    assert before.named("process wait")[0].status.status_code is StatusCode.UNSET
    async with opened(tmp_path / "queue.db") as engine:
        queue = traced(engine, after, clock)
        recorder = EventRecorder(queue)
        async with working(queue):
            await recorder.until(EventType.STARTED)
    (attempt,) = after.all
    assert is_own_trace(attempt)
    assert linked_ids(attempt) == [request.span_id]


async def test_a_failed_attempt_has_the_type_of_its_error_but_nothing_confidential(
    queue: Queue[None], spans: Spans
) -> None:
    for function in (send_after_a_failure, fail):
        await add(queue, function)
    await run(queue)
    errors = {
        attributes["afterward.task.outcome"]: (attributes.get("error.type"), span.status)
        for span in spans.all
        if (attributes := attributes_of(span))
    }
    assert {outcome: error for outcome, (error, _) in errors.items()} == {
        "retrying": "TemporaryError",
        "failed": "PermanentError",
        "succeeded": None,
    }
    assert [status.status_code for _, status in errors.values()].count(StatusCode.ERROR) == 2
    assert ADDRESS not in "".join(span.to_json() for span in spans.all)


@pytest.mark.parametrize("damaged", ["", "?", "null", "[]", "{}"])
async def test_an_error_that_cannot_be_read_has_an_unknown_type(spans: Spans, damaged: str) -> None:
    with OpenTelemetry(spans.provider).attempt(a_task()) as record_outcome:
        record_outcome(Outcome(Status.FAILED, error=damaged))
    (attempt,) = spans.all
    assert attributes_of(attempt)["error.type"] == "Unknown"


async def test_a_follow_up_is_a_child_of_the_attempt_that_added_it(
    queue: Queue[None], spans: Spans
) -> None:
    await add(queue, send_two)
    await run(queue)
    (attempt,), (follow_up,) = spans.named("process send_two"), spans.named("process send")
    assert follow_up.parent is not None
    assert follow_up.parent.span_id == id_of(attempt).span_id


async def test_the_span_is_the_current_one_until_the_subscribers_are_told(
    queue: Queue[None], spans: Spans
) -> None:
    """So the log lines of an attempt have the ids of its span."""
    current = {}
    queue.events.subscribe(
        lambda event: current.update({event.type: get_current_span().get_span_context()})
    )
    with spans.request() as request:
        await add(queue)
    await run(queue)
    (attempt,) = spans.named("process send")
    assert current == {
        EventType.QUEUED: request,
        EventType.STARTED: id_of(attempt),
        EventType.SUCCEEDED: id_of(attempt),
    }


async def test_the_span_of_an_attempt_that_cancels_itself_ends(
    queue: Queue[None], spans: Spans
) -> None:
    recorder = EventRecorder(queue)
    await add(queue, cancel_itself)
    async with working(queue):
        await recorder.until(EventType.SUCCEEDED)
    assert {attributes_of(span)["afterward.task.outcome"] for span in spans.all} == {"succeeded"}


# The trace context of a task


async def test_without_a_span_a_task_has_no_trace_context_and_its_attempts_are_traces(
    queue: Queue[None], spans: Spans
) -> None:
    task = await add(queue, send_after_a_failure)
    assert task.trace_context is None
    await run(queue)
    assert all(is_own_trace(attempt) and not attempt.links for attempt in spans.all)
    assert len(spans.all) == 2


async def test_without_tracing_a_task_has_no_trace_context(
    engine: Engine, spans: Spans, clock: Clock
) -> None:
    queue = Queue[None](engine, Registry(send), NO_WAITS, now=clock)
    with spans.request():
        task = await add(queue)
    assert task.trace_context is None
    await run(queue)
    assert len(spans.all) == 1  # the request


async def test_the_attempt_of_a_request_that_is_not_sampled_is_not_exported(
    engine: Engine, clock: Clock
) -> None:
    unsampled, spans = Spans(ALWAYS_OFF), Spans()
    with unsampled.request():
        task = await add(traced(engine, unsampled, clock))
    assert task.trace_context is not None  # so all spans of the request are left out
    await run(traced(engine, spans, clock))
    assert not spans.all
    assert not unsampled.all


@pytest.mark.parametrize("damaged", ["", "00-0-0-0", "?", f"00-{'0' * 32}-{'0' * 16}-01"])
async def test_a_damaged_trace_context_does_no_harm(
    queue: Queue[None], spans: Spans, damaged: str
) -> None:
    arguments = f'{{"args":["{ADDRESS}"],"kwargs":{{}}}}'
    task = a_task(kind="send_after_a_failure", arguments=arguments)
    await put(queue.engine, replace(task, trace_context=damaged))
    await run(queue)
    assert [is_own_trace(attempt) and not attempt.links for attempt in spans.all] == [True, True]


async def test_afterward_passes_the_tracing_on(tmp_path: Path, spans: Spans) -> None:
    afterward: Afterward[None] = Afterward(
        f"sqlite:///{tmp_path}/queue.db", tasks=[send], tracing=OpenTelemetry(spans.provider)
    )
    recorder = EventRecorder(afterward.queue)
    async with afterward.running() as queue:
        with spans.request() as request:
            await add(queue)
        await recorder.until(EventType.SUCCEEDED)
    (attempt,) = spans.named("process send")
    assert id_of(attempt).trace_id == request.trace_id


# Errors of the tracing


class Broken(Tracing):
    """Raises an error at each of these places."""

    def __init__(self, *places: str) -> None:
        self._places = places

    def _reach(self, place: str) -> None:
        if place in self._places:
            raise LookupError(place)

    def trace_context(self) -> str | None:
        """Return nothing."""
        self._reach("trace_context")
        return None

    def attempt(self, _: Task) -> AbstractContextManager[Callable[[Outcome], object]]:
        """Return a context manager."""
        self._reach("attempt")
        return self._span()

    @contextmanager
    def _span(self) -> Iterator[Callable[[Outcome], object]]:
        self._reach("enter")
        try:
            yield lambda _: self._reach("outcome")
        finally:
            self._reach("exit")


@pytest.mark.parametrize(
    "places",
    [("trace_context",), ("attempt",), ("enter",), ("outcome",), ("exit",), ("outcome", "exit")],
    ids=" and ".join,
)
async def test_an_error_of_the_tracing_is_logged_and_harms_no_task(
    engine: Engine, clock: Clock, places: tuple[str, ...]
) -> None:
    """Otherwise the task would stay running, and its slot would be lost."""
    queue = Queue[None](engine, Registry(send), NO_WAITS, now=clock, tracing=Broken(*places))
    with capture_logs() as lines:
        tasks = [await add(queue) for _ in range(2)]
        await asyncio.wait_for(Worker(queue, None, concurrency=1).run_until_idle(), 10)
    assert [(await queue.get(task.id)).status for task in tasks] == [Status.SUCCEEDED] * 2
    errors = [line for line in lines if line["log_level"] == "error"]
    assert {line["event"] for line in errors} == {"the tracing fails"}
    assert len(errors) == 2 * len(places)
    assert all(line["exc_info"] for line in errors)


class BrokenSampler(Sampler):
    """Raises an error for each span."""

    def should_sample(self, *_: Any, **__: Any) -> SamplingResult:
        """Raise an error."""
        raise LookupError("sampler")

    def get_description(self) -> str:
        """Return the name of the sampler."""
        return "broken"


class BrokenProcessor(SpanProcessor):
    """Raises an error when a span starts."""

    def on_start(self, *_: Any, **__: Any) -> None:
        """Raise an error."""
        raise LookupError("processor")


@pytest.mark.parametrize("fails", ["sampler", "processor"])
async def test_an_error_in_the_set_up_of_opentelemetry_harms_no_task(
    engine: Engine, clock: Clock, fails: str
) -> None:
    """The SDK passes it on to the caller."""
    spans = Spans(BrokenSampler()) if fails == "sampler" else Spans()
    if fails == "processor":
        spans.provider.add_span_processor(BrokenProcessor())
    queue = traced(engine, spans, clock)
    with capture_logs() as lines:
        task = await add(queue)
        await asyncio.wait_for(run(queue), 10)
    assert (await queue.get(task.id)).status is Status.SUCCEEDED
    assert [line["event"] for line in lines if line["log_level"] == "error"] == [
        "the tracing fails"
    ]


@pytest.mark.parametrize("places", [(), ("exit",)])
def test_an_error_inside_the_span_of_an_attempt_passes(places: tuple[str, ...]) -> None:
    with pytest.raises(asyncio.CancelledError), trace_attempt(Broken(*places), a_task()):
        raise asyncio.CancelledError


def test_the_library_imports_opentelemetry_only_if_it_is_asked_to() -> None:
    program = "import sys, afterward.queue, afterward.worker; print('opentelemetry' in sys.modules)"
    imported = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    )
    assert imported.stdout == "False\n"
