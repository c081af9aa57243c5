"""Does what was promised: claims tasks, runs them, and writes down how each one ended."""

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

import structlog

from afterward.attempt import call, error_as_json, within
from afterward.circuit_breaker import Admits, Pass
from afterward.errors import QueueUnavailable, ServiceUnavailable
from afterward.events import EventType
from afterward.pauses import Pauses, Return
from afterward.queue import Queue
from afterward.retry import is_unexpected
from afterward.task import WAITING, Outcome, Status, Task, new_id, to_json
from afterward.unit_of_work import Context

POLL_SECONDS = 0.5  # how late a retry may be noticed
FIRST_PAUSE_SECONDS = 0.1  # between two tries while the database refuses
LONGEST_PAUSE_SECONDS = 5.0
QUIET_SECONDS = 0.05  # in which no task has begun or ended, and the worker is not busy
LAST_WRITES_SECONDS = 0.5  # for a stopping worker; with a database that refuses, it goes without
TRIES = 3  # to write an outcome that the database does not take, though it takes others

_NOT_WRITTEN = Outcome(
    Status.FAILED,
    error=to_json(
        {
            "type": "OutcomeNotWritten",
            "detail": "the attempt ended, but its outcome is not storable",
        }
    ),
    unexpected=True,
)

ToolsT = TypeVar("ToolsT")
ResultT = TypeVar("ResultT")

log = structlog.get_logger(__name__)


class Worker(Generic[ToolsT]):
    """Runs up to `concurrency` tasks at once on the event loop.

    `lease` is how long, in seconds, the others believe that this worker lives without hearing of
    it; `task_timeout` how long one attempt may take.
    """

    def __init__(
        self,
        queue: Queue[ToolsT],
        tools: ToolsT,
        *,
        concurrency: int = 10,
        lease: float = 30.0,
        task_timeout: float = 900.0,
    ) -> None:
        self._queue = queue
        self._tools = tools
        self._concurrency = concurrency
        self._lease = lease
        self._task_timeout = task_timeout
        self.owner = f"{socket.gethostname()}:{os.getpid()}:{new_id(queue.now())[-12:]}"
        self._pauses = Pauses(queue.registry, queue.now)
        self._attempts: dict[_Claim, asyncio.Task[None]] = {}
        self._settling: set[_Claim] = set()  # of those, the ones that have run
        self._suspect: asyncio.Task[None] | None = None  # of those, the one in a crash before
        self._stopping = asyncio.Event()
        self._slot_free = asyncio.Event()
        self._pause_begins = asyncio.Event()
        self._last_step_at = float("-inf")  # when a task began or ended
        self._loops: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Begin to work."""
        self._loops = [
            asyncio.create_task(self._claim_tasks(), name="worker-claims"),
            asyncio.create_task(self._beat(), name="worker-heartbeat"),
        ]

    async def stop(self, grace: float) -> None:
        """Claim nothing more; let what runs finish within `grace` seconds, give back the rest."""
        grace_ends_at = time.monotonic() + grace
        self._stopping.set()
        self._slot_free.set()
        claims, heartbeat = self._loops
        # A claim under way is waited for, because its tasks must run or be given back.
        await _end([claims], within=max(grace, LAST_WRITES_SECONDS))
        if running := list(self._attempts.values()):
            await asyncio.wait(running, timeout=max(0.0, grace_ends_at - time.monotonic()))
        for attempt in self._attempts.values():
            attempt.cancel()
        await _end([*self._attempts.values()], within=LAST_WRITES_SECONDS)
        heartbeat.cancel()
        await _end([heartbeat], within=LAST_WRITES_SECONDS)

    @property
    def is_busy(self) -> bool:
        """Whether tasks begin and end, and do not all wait for something that takes long."""
        return time.monotonic() - self._last_step_at < QUIET_SECONDS

    async def run_until_idle(self) -> None:
        """Work until nothing is due and nothing runs; for tests, which then need not sleep."""
        while await self._claim_due() or self._attempts:
            await asyncio.gather(*self._attempts.values())

    # Claiming

    async def _claim_tasks(self) -> None:
        while not self._stopping.is_set():
            self._slot_free.clear()
            if await self._persist(self._claim_due, sooner=self._stopping):
                continue
            if len(self._attempts) >= self._concurrency:
                await self._slot_free.wait()
            else:
                await self._rest()

    async def _rest(self) -> None:
        """Wait until tasks may have come, a pause or a suspect ends, or the worker is to stop."""
        self._pause_begins.clear()
        pause = self._pauses.next_end()
        waits = [
            asyncio.create_task(
                self._queue.engine.wait_for_tasks(
                    POLL_SECONDS if pause is None else min(pause, POLL_SECONDS)
                )
            ),
            asyncio.create_task(self._stopping.wait()),
            asyncio.create_task(self._pause_begins.wait()),  # it may end before the next look
        ]
        ends = [self._suspect] if self._suspect else []
        await asyncio.wait([*waits, *ends], return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
        await asyncio.gather(*waits, return_exceptions=True)

    async def _claim_due(self) -> bool:
        """Claim due tasks for the free slots, and begin them; False if none came.

        A slot whose task has run, and whose end is being written, counts as free: on SQLite the
        claim shares that commit. But the next task begins only when that end is on disk, so that a
        crash lets no more than `concurrency` tasks run again.

        Of the tasks that were running when a worker died, one may have killed it. They run one at
        a time: together they would all be in its next crash, and fail with it in the third.
        """
        if self._stopping.is_set():
            return False
        # 1. After the pause of a kind, one of its tasks finds out whether the service is back.
        claimed = 0
        for kind in self._pauses.kinds(Admits.ONE):
            claimed += await self._claim([kind], at_most=1)
        # 2. Tasks of the kinds without a pause take the other slots. Without any such kind, the
        #    claim re-queues the tasks of dead workers all the same.
        claimed += await self._claim(self._pauses.kinds(Admits.ALL), at_most=self._concurrency)
        return claimed > 0

    async def _claim(self, kinds: list[str], *, at_most: int) -> int:
        """Claim due tasks of these kinds for the free slots, and begin them; gives how many."""
        free = self._concurrency - (len(self._attempts) - len(self._settling))
        if free <= 0:
            return 0
        if self._suspect and self._suspect.done():
            self._suspect = None
        claim = await self._queue.engine.claim(
            self.owner,
            kinds=kinds,
            limit=min(free, at_most),
            suspect=self._suspect is None,
            now=self._queue.now(),
            lease=self._lease,
        )
        for task in claim.running:
            attempt = await self._begin(task)
            if task.crashes:
                self._suspect = attempt
        for task in claim.recovered:
            failed = task.status is Status.FAILED
            self._queue.events.emit(EventType.FAILED if failed else EventType.RECOVERED, task)
        return len(claim.running) + len(claim.recovered)

    async def _begin(self, task: Task) -> asyncio.Task[None]:
        while len(self._attempts) >= self._concurrency and not self._stopping.is_set():
            self._slot_free.clear()
            await self._slot_free.wait()
        allowed = self._pauses.begin(task.kind)
        attempt = asyncio.create_task(
            self._attempt(task, allowed, self._call_off_earlier(task)), name=task.id
        )
        self._attempts[_Claim.of(task)] = attempt
        self._last_step_at = time.monotonic()
        return attempt

    def _call_off_earlier(self, task: Task) -> list[asyncio.Task[None]]:
        """Cancel attempts of a task that this worker lost to another and has won back."""
        if task.claims == 1:
            return []
        earlier = [claim for claim in self._attempts if claim.task_id == task.id]
        for claim in earlier:
            if claim not in self._settling:
                self._attempts[claim].cancel()
        return [self._attempts[claim] for claim in earlier]

    # Running

    async def _attempt(self, task: Task, allowed: Pass, earlier: list[asyncio.Task[None]]) -> None:
        """Run one attempt and settle it, whatever happens in between."""
        with structlog.contextvars.bound_contextvars(
            task_id=task.id, kind=task.kind, request_id=task.request_id
        ):
            began = time.monotonic()
            try:
                ended = await self._run(task, allowed, earlier)
                self._settling.add(_Claim.of(task))
                outcome, settled = await self._settle(task, ended.outcome)
            finally:
                del self._attempts[_Claim.of(task)]
                self._settling.discard(_Claim.of(task))
                self._slot_free.set()
                self._last_step_at = time.monotonic()
            seconds = time.monotonic() - began
            what = EventType.LOST if settled is None else _what_happened(outcome)
            self._queue.events.emit(what, settled or task, seconds=seconds, exception=ended.error)
            for follow_up in outcome.follow_ups.tasks if settled else ():
                self._queue.events.emit(EventType.QUEUED, follow_up)
            if ended.service_is_back is not None:
                await self._tell_of_return(ended.service_is_back)

    async def _run(self, task: Task, allowed: Pass, earlier: list[asyncio.Task[None]]) -> "_Ended":
        """Call the task's function, and say how that ended."""
        this = asyncio.current_task()
        assert this is not None
        follow_ups = self._queue.collect(task.request_id, task.client)
        context = Context(task, self._tools, follow_ups, self._reporter(task))
        function = self._queue.registry.function(task.kind)
        try:
            await self._wait_for(earlier)
            self._queue.events.emit(EventType.STARTED, task)
            result = await within(self._task_timeout, call(function, context, task.arguments))
        except BaseException as error:  # noqa: BLE001 -- a task may raise anything
            # Cancelled by this worker, which stops or has lost the task to another, whatever the
            # task made of the cancellation. A task that cancelled itself has failed.
            called_off = bool(this.cancelling())
            service_is_back = self._pauses.end(task, allowed, error, called_off=called_off)
            outcome = (
                Outcome(Status.QUEUED, due_at=self._queue.now(), counts=False)
                if called_off
                else self._after_failure(task, error)
            )
            return _Ended(outcome, error, service_is_back)
        service_is_back = self._pauses.end(task, allowed, None, called_off=False)
        outcome = Outcome(Status.SUCCEEDED, result=result, follow_ups=follow_ups.collected())
        return _Ended(outcome, None, service_is_back)

    async def _wait_for(self, earlier: list[asyncio.Task[None]]) -> None:
        """Wait until the earlier attempts of the same task have ended."""
        if earlier:
            _, left = await asyncio.wait(earlier, timeout=self._task_timeout)
            if left:
                raise TimeoutError("an earlier attempt of this task does not end")

    def _after_failure(self, task: Task, error: BaseException) -> Outcome:
        if is_outage := isinstance(error, ServiceUnavailable):
            self._pause_begins.set()
        resumes_at = self._pauses.resumes_at(task.kind) if is_outage else None
        due_at = self._queue.policy_of(task.kind).next_attempt_at(
            task, error, self._queue.now(), resumes_at=resumes_at
        )
        return Outcome(
            Status.FAILED if due_at is None else Status.RETRYING,
            due_at=due_at,
            error=error_as_json(error),
            unexpected=is_unexpected(error),
        )

    async def _settle(self, task: Task, outcome: Outcome) -> tuple[Outcome, Task | None]:
        """Write the outcome; give what was written, and the task, or None if the claim was lost.

        An outcome that the database does not take would be tried for ever, and its task run for
        ever. After a few tries the task fails instead.
        """
        ended_at, failures = self._queue.now(), 0

        async def settle() -> tuple[Outcome, Task | None]:
            nonlocal failures
            written = outcome if failures < TRIES else _NOT_WRITTEN
            try:
                return written, await self._queue.engine.settle(task, written, ended_at)
            except QueueUnavailable:
                raise
            except Exception:
                failures += 1
                raise

        return await self._persist(settle)

    async def _tell_of_return(self, service: Return) -> None:
        waiting: int | None = None
        with contextlib.suppress(QueueUnavailable):
            counts = (await self._queue.engine.backlog()).counts
            waiting = sum(counts.get(status, 0) for status in WAITING)
        log.warning(
            "a service is back, its tasks go on",
            kind=service.kind,
            away_for=round(service.away_for, 1),
            waiting=waiting,
        )

    def _reporter(self, task: Task) -> Callable[[float], Awaitable[None]]:
        async def report(progress: float) -> None:
            fraction = min(max(progress, 0.0), 1.0)
            with contextlib.suppress(QueueUnavailable):  # a courtesy: no reason to fail the task
                reported = await self._queue.engine.report(task, fraction, self._queue.now())
                if reported is not None:
                    self._queue.events.emit(EventType.PROGRESSED, reported)

        return report

    # Staying alive

    async def _beat(self) -> None:
        """Keep the leases of what runs; and see that no clock holds up what waits."""
        while True:
            await self._persist(self._pull_forward)
            await asyncio.sleep(self._lease / 3)
            await self._persist(self._hold_on)

    async def _hold_on(self) -> None:
        """Extend the leases, and cancel the attempts whose tasks have been lost to others."""
        running = set(self._attempts)
        held = await self._queue.engine.extend(self.owner, now=self._queue.now(), lease=self._lease)
        for lost in ((running - held) & self._attempts.keys()) - self._settling:
            self._attempts[lost].cancel()

    async def _pull_forward(self) -> None:
        await self._queue.engine.pull_forward(
            now=self._queue.now(), longest_wait=self._queue.policy.maximum
        )

    async def _persist(
        self, ask: Callable[[], Awaitable[ResultT]], *, sooner: asyncio.Event | None = None
    ) -> ResultT:
        """Ask the engine until it answers: a full disk or a locked database passes.

        Any other error is logged, and the engine asked again too: a worker that ended here would
        leave a service that accepts and does nothing. When `sooner` is set, it asks at once.
        """
        pause = FIRST_PAUSE_SECONDS
        asking = asyncio.current_task()
        assert asking is not None
        cancelled = asking.cancelling()
        while True:
            try:
                return await ask()
            except QueueUnavailable as error:
                if asking.cancelling() > cancelled:  # the driver made an error of it
                    raise asyncio.CancelledError from error
                log.warning(
                    "database refuses", error=repr(error.__cause__ or error), again_in=pause
                )
            except Exception:
                log.exception("database fails", again_in=pause)
            await _pause(pause, until=sooner)
            pause = min(pause * 2, LONGEST_PAUSE_SECONDS)


class _Claim(NamedTuple):
    """A task under one of its claims: what an attempt is known by."""

    task_id: str
    number: int

    @classmethod
    def of(cls, task: Task) -> "_Claim":
        """The claim under which a task is held."""
        return cls(task.id, task.claims)


@dataclass(frozen=True, slots=True)
class _Ended:
    """An attempt that has run."""

    outcome: Outcome
    error: BaseException | None
    service_is_back: Return | None


async def _end(tasks: list[asyncio.Task[None]], *, within: float) -> None:
    """Wait for tasks to end, and cancel those that do not."""
    if tasks:
        _, late = await asyncio.wait(tasks, timeout=within)
        for task in late:
            task.cancel()
        if late:
            await asyncio.wait(late, timeout=LAST_WRITES_SECONDS)


async def _pause(seconds: float, *, until: asyncio.Event | None) -> None:
    """Wait so many seconds, or until an event is set."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await (until or asyncio.Event()).wait()


def _what_happened(outcome: Outcome) -> EventType:
    return EventType.GIVEN_BACK if not outcome.counts else EventType(outcome.status)
