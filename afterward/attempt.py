"""One attempt of a task: run its function, settle it, and tell the subscribers how it ended."""

import asyncio
import contextlib
import math
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Generic, TypeVar

import structlog

from afterward.call import call, error_as_json, with_timeout
from afterward.errors import QueueUnavailable, ServiceUnavailable, WorkerStopped
from afterward.events import EventType
from afterward.keep_trying import keep_trying
from afterward.pauses import OutageEnd, Pauses
from afterward.queue import Queue
from afterward.retry import is_unexpected
from afterward.task import WAITING, Outcome, Status, Task, to_json
from afterward.tracing import trace_attempt
from afterward.unit_of_work import Context

OUTCOME_TRIES = 3  # the reason is in Attempt._settle

# Written instead of an outcome that the database has refused OUTCOME_TRIES times.
_OUTCOME_NOT_WRITTEN = Outcome(
    Status.FAILED,
    error=to_json(
        {
            "type": "OutcomeNotWritten",
            "detail": "the attempt ended, but its outcome is not storable",
        }
    ),
    unexpected=True,
)

_ONLY_ATTEMPT_CUT_OFF = (
    "the worker stopped during the only attempt of this task, so the work may be done or not"
)

ToolsT = TypeVar("ToolsT")

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class _Ended:
    """The end of a task's function. The outcome is not written yet."""

    outcome: Outcome
    error: BaseException | None = None
    outage_end: OutageEnd | None = None


def given_back(now: float) -> Outcome:
    """Return the outcome of an attempt that the worker did not begin, or did not let finish."""
    return Outcome(Status.QUEUED, due_at=now, counts=False)


class Attempt(Generic[ToolsT]):
    """One claimed task while this worker runs and settles it. It starts when it is made.

    It runs in an asyncio task of its own. `timeout` is the longest time for the function, in
    seconds. `on_settled` is called when the settlement has ended, so that the worker frees the
    slot. `worker_ends` tells whether the worker stops, or is cancelled together with the whole
    program.

    `earlier` has attempts of the same task that still run on this worker. It is empty as a rule.
    For example, a worker hangs for longer than its lease, another worker re-queues the task, and
    then the first worker claims it again. The new attempt waits until the earlier one has ended, so
    that one worker never runs two attempts of a task side by side.
    """

    def __init__(
        self,
        task: Task,
        queue: Queue[ToolsT],
        tools: ToolsT,
        pauses: Pauses,
        *,
        timeout: float,
        earlier: Collection["Attempt[ToolsT]"],
        on_settled: Callable[["Attempt[ToolsT]"], None],
        worker_ends: Callable[[], bool],
    ) -> None:
        self.task = task
        self.key = task.id, task.claims
        """The task's id and the number of its claim (the fencing token)."""
        self.is_suspect = task.crashes > 0
        """Whether a worker crashed during the last attempt of this task.

        The task may have caused the crash, so a worker runs only one suspect at a time.
        """
        self.is_settling = False
        """Whether the function has ended. From then on the outcome is being written."""
        self.found_outage = False
        """Whether the function raised ServiceUnavailable."""
        self._has_begun = False  # whether the function has been called
        self._is_called_off = False  # whether the worker has cancelled this attempt
        self._queue = queue
        self._tools = tools
        self._pauses = pauses
        self._timeout = timeout
        self._earlier = earlier
        self._on_settled = on_settled
        self._worker_ends = worker_ends
        self._permit = pauses.begin(task.kind)
        self.asyncio_task = asyncio.create_task(self._run_and_settle(), name=task.id)

    def cancel(self) -> None:
        """Cancel the attempt. Unless its function returns all the same, its task is given back.

        A task with a single attempt fails instead, once its function has been called.
        """
        self._is_called_off = True
        self.asyncio_task.cancel()

    async def _run_and_settle(self) -> None:
        task = self.task
        with (
            structlog.contextvars.bound_contextvars(
                task_id=task.id, kind=task.kind, request_id=task.request_id
            ),
            trace_attempt(self._queue.tracing, task) as trace_outcome,
        ):
            began = time.monotonic()
            ended = await self._run()
            trace_outcome(ended.outcome)
            self.is_settling = True
            settling = self._settle_and_tell(ended, began)
            if self.asyncio_task.cancelling() and not self._is_called_off:
                # The function has cancelled its own asyncio task, as an anyio scope does that is
                # never left. Such a cancellation may still be due, and would interrupt the
                # settlement. So that is an asyncio task of its own.
                self.asyncio_task = asyncio.create_task(settling, name=task.id)
            else:
                await settling

    async def _settle_and_tell(self, ended: _Ended, began: float) -> None:
        try:
            outcome, task = await self._settle(ended.outcome)
        finally:
            self._on_settled(self)
        self._tell_subscribers(outcome, task, ended.error, time.monotonic() - began)
        if ended.outage_end is not None:
            await self._log_outage_end(ended.outage_end)

    # Run

    async def _run(self) -> _Ended:
        """Call the task's function, and return how it ended. Raises nothing."""
        task = self.task
        follow_ups = self._queue.collect(task.request_id, task.client)
        context = Context(task, self._tools, follow_ups, self._report_progress)
        signature = self._queue.registry.signature(task.kind)
        try:
            await self._wait_for_earlier()
            self._queue.events.emit(EventType.STARTED, task)
            self._has_begun = True
            result = await with_timeout(self._timeout, call(signature, context, task.arguments))
        except BaseException as error:  # noqa: BLE001 -- a task's function may raise any error
            return self._ended_with(error)
        outage_end = self._pauses.end(task, self._permit, None, called_off=False)
        outcome = Outcome(Status.SUCCEEDED, result=result, follow_ups=follow_ups.collected())
        return _Ended(outcome, None, outage_end)

    async def _wait_for_earlier(self) -> None:
        """Wait until the earlier attempts of the same task have ended. Raises TimeoutError."""
        if self._earlier:
            running = [attempt.asyncio_task for attempt in self._earlier]
            _, left = await asyncio.wait(running, timeout=self._timeout)
            if left:
                raise TimeoutError("an earlier attempt of this task does not end")

    def _ended_with(self, error: BaseException) -> _Ended:
        # The worker calls an attempt off if it stops, or has lost the task to another worker. And a
        # second Ctrl-C makes asyncio.run cancel all asyncio tasks. Then the task is given back,
        # even if the function turned the cancellation into another error. A function that raises a
        # CancelledError of its own, or cancels its own asyncio task, has failed: if such attempts
        # did not count, the task would run again for ever.
        if self.asyncio_task.cancelling() and self._worker_ends():
            self._is_called_off = True
        called_off = self._is_called_off
        outage_end = self._pauses.end(self.task, self._permit, error, called_off=called_off)
        if called_off and not (self._has_begun and self.task.max_attempts == 1):
            return _Ended(given_back(self._queue.now()), error, outage_end)
        if called_off:
            # For example, the function waits for the reply to a mail that it has sent. A policy of
            # one attempt forbids a second mail. So this attempt counts, as it does after a crash.
            error = WorkerStopped(_ONLY_ATTEMPT_CUT_OFF)
        self.found_outage = isinstance(error, ServiceUnavailable)
        resumes_at = self._pauses.resumes_at(self.task.kind) if self.found_outage else None
        return _Ended(self._outcome_of_failure(error, resumes_at), error, outage_end)

    def _outcome_of_failure(self, error: BaseException, resumes_at: float | None) -> Outcome:
        """Return RETRYING or FAILED. `resumes_at` is the end of a pause, if the service is away."""
        task, policy = self.task, self._queue.policy_of(self.task.kind)
        due_at: float | None = None
        try:
            due_at = policy.next_attempt_at(task, error, self._queue.now(), resumes_at=resumes_at)
        except Exception:
            # The outcome must be written all the same: without one, the task would stay running
            # until this process ends.
            with contextlib.suppress(Exception):  # the disk of the log may be full
                log.exception("the retry policy fails, so the task fails", kind=task.kind)
        return Outcome(
            Status.FAILED if due_at is None else Status.RETRYING,
            due_at=due_at,
            error=error_as_json(error),
            unexpected=is_unexpected(error),
        )

    async def _report_progress(self, progress: float) -> None:
        fraction = min(max(progress, 0.0), 1.0)
        if math.isnan(fraction):
            raise ValueError("progress must be a number from 0 to 1, and it is NaN")
        # Progress is only shown, so a database that refuses it is no reason to fail the task.
        with contextlib.suppress(QueueUnavailable):
            reported = await self._queue.engine.report(self.task, fraction, self._queue.now())
            if reported is not None:
                self._queue.events.emit(EventType.PROGRESSED, reported)

    # Settle

    async def _settle(self, outcome: Outcome) -> tuple[Outcome, Task | None]:
        """Write the outcome. Return the outcome that was written, and the task after that.

        The task is None if its claim was lost. Then nothing was written.

        While the database is unavailable, the worker keeps trying. If the database refuses this
        outcome three times for another reason, the task fails instead: otherwise the worker would
        try for ever, and after a restart the task would run again.
        """
        ended_at, refusals = self._queue.now(), 0

        async def write() -> tuple[Outcome, Task | None]:
            nonlocal refusals
            to_write = outcome if refusals < OUTCOME_TRIES else _OUTCOME_NOT_WRITTEN
            try:
                return to_write, await self._queue.engine.settle(self.task, to_write, ended_at)
            except QueueUnavailable:
                raise
            except Exception:
                refusals += 1
                raise

        return await keep_trying(write)

    # Tell

    def _tell_subscribers(
        self, written: Outcome, settled: Task | None, error: BaseException | None, seconds: float
    ) -> None:
        events = self._queue.events
        if settled is None:
            events.emit(EventType.LOST, self.task, seconds=seconds, exception=error)
            return
        # SUCCEEDED, RETRYING and FAILED have the same values in Status and in EventType.
        event_type = EventType(written.status) if written.counts else EventType.GIVEN_BACK
        events.emit(event_type, settled, seconds=seconds, exception=error)
        for follow_up in written.follow_ups.tasks:
            events.emit(EventType.QUEUED, follow_up)

    async def _log_outage_end(self, outage: OutageEnd) -> None:
        """Log that a service is back. `waiting` counts the waiting tasks of all kinds.

        The database keeps no count for each kind, and counting a million rows takes too long.
        """
        waiting: int | None = None
        with contextlib.suppress(QueueUnavailable):
            counts = (await self._queue.engine.backlog()).counts
            waiting = sum(counts.get(status, 0) for status in WAITING)
        log.warning(
            "a service is back, its tasks go on",
            kind=outage.kind,
            away_for=round(outage.away_for, 1),
            waiting=waiting,
        )
