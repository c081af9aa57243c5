"""The worker: claim due tasks, run them, settle them.

     +---> wait until a task is due and a slot is free
     |       |
     |       v
     |     claim     one transaction for all free slots: the rows become RUNNING, under a lease,
     |       |       and their attempts are counted. After an outage, a transaction more for the
     |       |       probe of each kind whose pause is over
     |       v
     |      run      an asyncio task for each of them; the heartbeat extends the leases
     |       |
     |       v
     |     settle    the row becomes SUCCEEDED, RETRYING or FAILED; or QUEUED again, if this
     |       |       worker stops first
     |       v
     +---- free the slot, and tell the subscribers

The loop that claims does not wait for the tasks that it starts. With 10 slots and 4 long tasks, it
goes on with the other 6 slots.

If the worker crashes between claim and settle, its leases expire. The next claim of another worker,
for example that of the restarted process, re-queues its tasks, and they run again. So no claimed
task is lost, and a task may run twice.

This module has the loop and the slots. `attempt` runs and settles one task, `heartbeat` extends the
leases, `pauses` tells which kinds of tasks may be claimed.
"""

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import Iterable
from typing import Generic, TypeVar

from afterward.attempt import Attempt, given_back
from afterward.circuit_breaker import Admits
from afterward.errors import QueueUnavailable
from afterward.events import EventType
from afterward.heartbeat import Heartbeat
from afterward.keep_trying import keep_trying
from afterward.pauses import Pauses
from afterward.queue import Queue
from afterward.task import Claim, Status, Task, new_id

# With a free slot, a worker claims at least this often. So it notices retries that are due, expired
# leases, and new tasks whose NOTIFY was lost with PostgreSQL's listening connection.
POLL_SECONDS = 0.5
QUIET_SECONDS = 0.05  # a worker is busy if a task began or ended within this time
# At a stop, the database has at least so long to end each last step: the claim under way, the
# settlement of the attempts that are cancelled or have just ended, the heartbeat.
LAST_STEP_SECONDS = 0.5

ToolsT = TypeVar("ToolsT")


class Worker(Generic[ToolsT]):
    """Runs up to `concurrency` tasks at once on the event loop, each with `tools`.

    If this worker sends no heartbeat for `lease` seconds, other workers re-queue its tasks. One
    attempt may take `task_timeout` seconds. A worker starts once; after its stop, make a new one.
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
        # Containers share host names and process ids. So the last 12 digits of an id, which are all
        # random, make the name unique.
        self.owner = f"{socket.gethostname()}:{os.getpid()}:{new_id(queue.now())[-12:]}"
        self._pauses = Pauses(queue.registry, queue.now)
        self._attempts: set[Attempt[ToolsT]] = set()  # claimed and not settled yet
        self._heartbeat = Heartbeat(queue, self.owner, self._attempts, lease=lease)
        self._stopping = asyncio.Event()
        self._slot_free = asyncio.Event()
        self._wake = asyncio.Event()  # set when the claim loop must not wait for the next poll
        self._last_step_at = float("-inf")  # when a task began or ended
        self._loops: list[asyncio.Task[None]] = []

    # Start and stop

    async def start(self) -> None:
        """Begin to claim and run tasks. Raises RuntimeError if the worker was started before."""
        if self._loops:
            raise RuntimeError("this worker was started before: make a new one")
        self._loops = [
            asyncio.create_task(self._claim_until_stopped(), name="worker-claims"),
            asyncio.create_task(self._heartbeat.run(), name="worker-heartbeat"),
        ]

    async def stop(self, grace: float) -> None:
        """Claim no more tasks. Running tasks have `grace` seconds to finish, then are given back.

        A task with a single attempt is not given back but fails, because its work may be done. The
        heartbeat goes on until the last task is settled, or until the time for that is over. Call
        this after `start`.
        """
        grace_ends_at = time.monotonic() + grace
        self._stopping.set()
        self._slot_free.set()
        self._wake.set()
        claims, heartbeat = self._loops
        try:
            # 1. A claim that is under way must end first, because its tasks must run or be given
            #    back.
            await _wait_or_cancel([claims], within=max(grace, LAST_STEP_SECONDS))
            # 2. Let running tasks finish. Look again after each wait, because an attempt may go on
            #    in another asyncio task.
            while (running := self._asyncio_tasks()) and time.monotonic() < grace_ends_at:
                await asyncio.wait(running, timeout=grace_ends_at - time.monotonic())
            # 3. Cancel the other attempts. Each of them writes that its task is given back. The
            #    attempts that are writing their outcome already go on. After LAST_STEP_SECONDS, all
            #    that are left are cancelled, even in the middle of a write. If such an outcome is
            #    not on disk, the lease expires, another worker re-queues the task, and it runs
            #    again.
            self._cancel_running()
            await _wait_or_cancel(self._asyncio_tasks(), within=LAST_STEP_SECONDS)
        except asyncio.CancelledError:
            claims.cancel()
            self._cancel_running()
            raise
        finally:
            heartbeat.cancel()
        await _wait_or_cancel([heartbeat], within=LAST_STEP_SECONDS)

    async def run_until_idle(self) -> None:
        """Work until no task is due and none runs. Tests use it in place of start and stop."""
        while await self._claim_due() or self._attempts:
            await asyncio.gather(*self._asyncio_tasks())

    @property
    def is_busy(self) -> bool:
        """Whether a task began or ended within QUIET_SECONDS.

        An app may let requests wait while this is so.
        """
        return time.monotonic() - self._last_step_at < QUIET_SECONDS

    @property
    def running(self) -> int:
        """The number of tasks that this worker has claimed, and not settled yet."""
        return len(self._attempts)

    # Claim

    async def _claim_until_stopped(self) -> None:
        while not self._stopping.is_set():
            await keep_trying(self._claim_or_wait, skip_pause=self._stopping)

    async def _claim_or_wait(self) -> None:
        """Claim due tasks. If none came, wait until there may be some."""
        # Cleared before the claim, so that an event during the claim is not missed.
        self._slot_free.clear()
        self._wake.clear()
        if await self._claim_due() or self._stopping.is_set():
            return
        if len(self._attempts) >= self._concurrency:
            await self._slot_free.wait()
        else:
            await self._wait_for_due_tasks()

    async def _wait_for_due_tasks(self) -> None:
        """Wait until tasks were added, a pause ends, `_wake` is set, or POLL_SECONDS are over.

        No event tells that a retry is due, so the worker finds it by the poll. Raises the error of
        the engine's wait.
        """
        pause = self._pauses.next_end()
        seconds = POLL_SECONDS if pause is None else min(pause, POLL_SECONDS)
        waits = [
            asyncio.create_task(self._queue.engine.wait_for_tasks(seconds)),
            asyncio.create_task(self._wake.wait()),
        ]
        try:
            ended, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        await asyncio.gather(*waits, return_exceptions=True)
        for wait in ended:
            wait.result()

    async def _claim_due(self) -> bool:
        """Claim due tasks for the free slots, and begin them. Return whether any task changed.

        During an outage, the tasks of the kind that needs the service are not claimed. They stay as
        they are, without an attempt, and only the probes are attempts.
        """
        # 1. After the pause of a kind, one of its tasks finds out whether the service is back.
        has_changed = False
        for kind in self._pauses.kinds(Admits.ONE):
            has_changed |= await self._claim([kind], at_most=1)
        # 2. Tasks of the kinds without a pause take the other slots. Even if every kind is paused,
        #    this claim is made, because it also re-queues the tasks of crashed workers.
        kinds = self._pauses.kinds(Admits.ALL)
        return await self._claim(kinds, at_most=self._concurrency) or has_changed

    async def _claim(self, kinds: list[str], *, at_most: int) -> bool:
        """Claim due tasks of these kinds, and begin them. Re-queue the tasks of crashed workers.

        Return whether any task was claimed or re-queued.

        With 10 slots, of which 4 have running tasks and 2 have tasks that are settling, it claims
        up to 6. The slots of the 2 count as free already, so that on SQLite the claim shares one
        commit with their outcomes. `_begin` waits until they are really free.
        """
        running = sum(not attempt.is_settling for attempt in self._attempts)
        free = self._concurrency - running
        if free <= 0 or self._stopping.is_set():
            return False
        # Suspects are tasks that ran when a worker crashed. One of them may be the cause, so they
        # run one at a time: together, all of them would crash three times, and fail.
        has_suspect = any(attempt.is_suspect for attempt in self._attempts)
        claim = await self._claim_or_give_back(
            kinds, limit=min(free, at_most), suspect=not has_suspect
        )
        for task in claim.running:
            await self._begin(task)
        self._tell_of_recovered(claim)
        return bool(claim.running or claim.recovered)

    async def _claim_or_give_back(self, kinds: list[str], *, limit: int, suspect: bool) -> Claim:
        """Claim tasks. If this is cancelled, wait for the claim all the same, and give it back.

        The worker cancels a claim that takes longer than the grace at the stop. The database may
        commit it later. If it does so before the engine has stopped, its tasks go back to the queue
        at once. Otherwise another worker re-queues them when their leases have expired.
        """
        claiming = asyncio.create_task(
            self._queue.engine.claim(
                self.owner,
                kinds=kinds,
                urgent=self._queue.registry.urgent,
                limit=limit,
                suspect=suspect,
                now=self._queue.now(),
                lease=self._lease,
            )
        )
        try:
            return await asyncio.shield(claiming)
        except asyncio.CancelledError:
            with contextlib.suppress(QueueUnavailable):
                await self._give_back(await claiming)
            raise

    async def _give_back(self, claim: Claim) -> None:
        """Queue the tasks of a claim again, without counting an attempt."""
        self._tell_of_recovered(claim)
        now = self._queue.now()
        settlements = [self._queue.engine.settle(t, given_back(now), now) for t in claim.running]
        for settled in await asyncio.gather(*settlements):
            if settled is not None:
                self._queue.events.emit(EventType.GIVEN_BACK, settled)

    def _tell_of_recovered(self, claim: Claim) -> None:
        for task in claim.recovered:
            failed = task.status is Status.FAILED
            self._queue.events.emit(EventType.FAILED if failed else EventType.RECOVERED, task)

    # Slots

    async def _begin(self, task: Task) -> None:
        """Begin an attempt once a slot is free, or at once if the worker stops.

        A task that is settling keeps its slot until its outcome is on disk. So if the process dies
        now, at most `concurrency` tasks have run without an outcome on disk, and run again. During
        a stop, a claimed task begins without a slot, so that it has the rest of the grace.
        """
        while len(self._attempts) >= self._concurrency and not self._stopping.is_set():
            self._slot_free.clear()
            await self._slot_free.wait()
        earlier = self._cancel_earlier(task)
        attempt = Attempt(
            task,
            self._queue,
            self._tools,
            self._pauses,
            timeout=self._task_timeout,
            earlier=earlier,
            on_settled=self._free_slot,
            worker_ends=self._ends,
        )
        self._attempts.add(attempt)
        self._last_step_at = time.monotonic()

    def _ends(self) -> bool:
        """Whether this worker stops, or its loops are cancelled because the program ends."""
        return self._stopping.is_set() or any(loop.cancelling() for loop in self._loops)

    def _cancel_earlier(self, task: Task) -> list[Attempt[ToolsT]]:
        """Cancel earlier attempts of this task that still run on this worker, and return them.

        There is one only if this worker was so slow that another worker re-queued the task, and
        this worker then claimed it again. An attempt that is settling is not cancelled, because it
        ends soon.
        """
        if task.claims == 1:
            return []
        earlier = [attempt for attempt in self._attempts if attempt.task.id == task.id]
        for attempt in earlier:
            if not attempt.is_settling:
                attempt.cancel()
        return earlier

    def _free_slot(self, attempt: Attempt[ToolsT]) -> None:
        self._attempts.discard(attempt)
        self._slot_free.set()
        self._last_step_at = time.monotonic()
        # The next suspect may run now, or the pause that has begun may end before the next poll.
        if attempt.is_suspect or attempt.found_outage:
            self._wake.set()

    def _cancel_running(self) -> None:
        """Cancel the attempts, except those that are writing their outcome."""
        for attempt in self._attempts:
            if not attempt.is_settling:
                attempt.cancel()

    def _asyncio_tasks(self) -> list[asyncio.Task[None]]:
        return [attempt.asyncio_task for attempt in self._attempts]


async def _wait_or_cancel(tasks: Iterable[asyncio.Task[None]], *, within: float) -> None:
    """Wait until the tasks have ended. Cancel the tasks that are still running after `within`.

    A cancelled task has LAST_STEP_SECONDS more to end. After that it is no longer waited for.
    """
    if left := set(tasks):
        _, left = await asyncio.wait(left, timeout=within)
        for task in left:
            task.cancel()
    if left:
        await asyncio.wait(left, timeout=LAST_STEP_SECONDS)
