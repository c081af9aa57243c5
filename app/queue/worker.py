"""Does what was promised: claims tasks, runs them, and writes down how each one ended."""

import asyncio
import contextlib
import json
import os
import socket
import time
from collections.abc import Awaitable, Callable
from typing import Any, Generic, TypeVar

import structlog

from app.queue.durable import Context
from app.queue.errors import QueueUnavailable, TaskError
from app.queue.events import What
from app.queue.queue import Queue
from app.queue.task import Outcome, Status, Task, new_id, to_json

POLL_SECONDS = 0.5  # how late a retry may be noticed
LONGEST_PAUSE_SECONDS = 5.0  # between two tries while the database refuses
QUIET_SECONDS = 0.05  # in which no task has begun or ended, and the worker is not busy
LAST_WRITES_SECONDS = 0.5  # for a stopping worker; with a database that refuses, it goes without

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
        self._attempts: dict[str, asyncio.Task[None]] = {}
        self._settling: set[str] = set()  # of those, the ones that have run
        self._suspect: asyncio.Task[None] | None = None  # of those, the one in a crash before
        self._stopping = asyncio.Event()
        self._slot_free = asyncio.Event()
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
        self._stopping.set()
        self._slot_free.set()
        claims, heartbeat = self._loops
        # A claim under way is waited for: what it claims must run, or be given back.
        await _end([claims], within=LAST_WRITES_SECONDS)
        if running := list(self._attempts.values()):
            await asyncio.wait(running, timeout=grace)
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
            if await self._persist(self._claim_due):
                continue
            if len(self._attempts) >= self._concurrency:
                await self._slot_free.wait()
            else:
                await self._rest()

    async def _rest(self) -> None:
        """Wait until tasks may have come, another suspect may run, or the worker is to stop."""
        waits = [
            asyncio.create_task(self._queue.engine.wait_for_tasks(POLL_SECONDS)),
            asyncio.create_task(self._stopping.wait()),
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
        free = self._concurrency - (len(self._attempts) - len(self._settling))
        if free <= 0:
            return False
        if self._suspect and self._suspect.done():
            self._suspect = None
        tasks = await self._queue.engine.claim(
            self.owner,
            kinds=list(self._queue.catalogue),
            limit=free,
            suspect=self._suspect is None,
            now=self._queue.now(),
            lease=self._lease,
        )
        for task in tasks:
            if task.status is not Status.RUNNING:  # taken back from a worker that died
                failed = task.status is Status.FAILED
                self._queue.events.emit(What.FAILED if failed else What.RECOVERED, task)
            else:
                attempt = await self._begin(task)
                if task.crashes:
                    self._suspect = attempt
        return bool(tasks)

    async def _begin(self, task: Task) -> asyncio.Task[None]:
        while len(self._attempts) >= self._concurrency:
            self._slot_free.clear()
            await self._slot_free.wait()
        if earlier := self._attempts.get(task.id):  # lost to another worker, and won back
            await _end([earlier], within=0)
        attempt = asyncio.create_task(self._attempt(task), name=task.id)
        self._attempts[task.id] = attempt
        self._last_step_at = time.monotonic()
        return attempt

    # Running

    async def _attempt(self, task: Task) -> None:
        """Run one attempt and settle it, whatever happens in between."""
        with structlog.contextvars.bound_contextvars(
            task_id=task.id, kind=task.kind, request_id=task.request_id
        ):
            self._queue.events.emit(What.STARTED, task)
            began = time.monotonic()
            try:
                outcome, error = await self._run(task)
                ended_at = self._queue.now()
                self._settling.add(task.id)
                settled = await self._persist(
                    lambda: self._queue.engine.settle(task, outcome, ended_at)
                )
            finally:
                del self._attempts[task.id]
                self._settling.discard(task.id)
                self._slot_free.set()
                self._last_step_at = time.monotonic()
            seconds = time.monotonic() - began
            what = What.LOST if settled is None else _what_happened(outcome)
            self._queue.events.emit(what, settled or task, seconds=seconds, exception=error)
            for follow_up in outcome.follow_ups.tasks if settled else ():
                self._queue.events.emit(What.QUEUED, follow_up)

    async def _run(self, task: Task) -> tuple[Outcome, BaseException | None]:
        """Give the outcome, and the error that led to it if one did."""
        deadline = asyncio.timeout(self._task_timeout)
        try:
            async with deadline:
                return await self._call(task), None
        except asyncio.CancelledError as error:
            if not self._attempts[task.id].cancelling():  # the task cancelled itself
                return self._after_failure(task, error), error
            # The worker stops, or has lost the task to another: none of the task's doing.
            return Outcome(Status.QUEUED, due_at=self._queue.now(), counts=False), error
        except TimeoutError as error:
            if deadline.expired():
                error.args = (f"the attempt took longer than {self._task_timeout:g} s",)
            return self._after_failure(task, error), error
        except BaseException as error:  # noqa: BLE001 - a task may raise anything; none is lost silently
            return self._after_failure(task, error), error

    async def _call(self, task: Task) -> Outcome:
        function = self._queue.catalogue.function(task.kind)
        assert function is not None  # the claim named the kinds of the catalogue
        follow_ups = self._queue.collect(task.request_id, task.client)
        context = Context(task, self._tools, follow_ups, self._reporter(task))
        call = json.loads(task.arguments)
        result = await function(context, *call["args"], **call["kwargs"])
        return Outcome(
            Status.SUCCEEDED,
            result=None if result is None else to_json(result),
            follow_ups=follow_ups.collected(),
        )

    def _after_failure(self, task: Task, error: BaseException) -> Outcome:
        wait = self._queue.policy.wait_after(
            task.attempts, task.max_attempts or self._queue.policy.attempts, error
        )
        if wait is None:
            return Outcome(Status.FAILED, error=_described(error))
        return Outcome(Status.RETRYING, due_at=self._queue.now() + wait, error=_described(error))

    def _reporter(self, task: Task) -> Callable[[float], Awaitable[None]]:
        async def report(progress: float) -> None:
            fraction = min(max(progress, 0.0), 1.0)
            with contextlib.suppress(QueueUnavailable):  # a courtesy: no reason to fail the task
                reported = await self._queue.engine.report(task, fraction, self._queue.now())
                if reported is not None:
                    self._queue.events.emit(What.PROGRESSED, reported)

        return report

    # Staying alive

    async def _beat(self) -> None:
        """Keep the leases of what runs; and see that no clock holds up what waits."""
        while True:
            await self._persist(self._pull_forward)
            await asyncio.sleep(self._lease / 3)
            await self._persist(self._hold_on)

    async def _hold_on(self) -> None:
        running = set(self._attempts)
        extended = await self._queue.engine.extend(
            self.owner, now=self._queue.now(), lease=self._lease
        )
        held = {task_id for task_id, _ in extended}
        for lost in ((running - held) & self._attempts.keys()) - self._settling:
            self._attempts[lost].cancel()

    async def _pull_forward(self) -> None:
        await self._queue.engine.pull_forward(
            now=self._queue.now(), longest_wait=self._queue.policy.maximum
        )

    async def _persist(self, ask: Callable[[], Awaitable[ResultT]]) -> ResultT:
        """Ask the engine until it answers: a full disk or a locked database passes.

        Whatever else it raises is logged, and asked again too: a worker that ended here would
        leave a service that accepts and does nothing.
        """
        pause = 0.1
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
            await asyncio.sleep(pause)
            pause = min(pause * 2, LONGEST_PAUSE_SECONDS)


async def _end(tasks: list[asyncio.Task[None]], *, within: float) -> None:
    """Wait for tasks to end, and cancel those that do not."""
    if tasks:
        _, late = await asyncio.wait(tasks, timeout=within)
        for task in late:
            task.cancel()
        if late:
            await asyncio.wait(late, timeout=LAST_WRITES_SECONDS)


def _what_happened(outcome: Outcome) -> What:
    return What.GIVEN_BACK if not outcome.counts else What(outcome.status)


def _described(error: BaseException) -> str:
    """The task's error as the API shows it."""
    facts: dict[str, Any] = error.facts if isinstance(error, TaskError) else {}
    return to_json({"type": type(error).__name__, "detail": str(error)[:1000], **facts})
