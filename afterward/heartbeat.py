"""The heartbeat of a worker: extend its leases, and cancel the attempts that have lost theirs.

It also makes retries due that would wait for too long, because the clock was set back. The leases
do not wait for that: a worker that lives must not lose them.

With a lease of 30 seconds, the leases are extended every 10 seconds. A worker that crashes, hangs
or loses its network stops doing so. Then its leases expire, and another worker re-queues its tasks.
If the first worker is only slow, its next heartbeat finds that it no longer holds those tasks.
"""

import asyncio
from collections.abc import Awaitable, Callable, Collection
from typing import Any

from afterward.attempt import Attempt
from afterward.keep_trying import keep_trying
from afterward.queue import Queue

PULLED_AT_ONCE = 1000  # retries, so that a statement stays short


class Heartbeat:
    """Extends the leases of one worker, and finds out which of them are lost.

    `owner` is the worker's name in the database, and `lease` the length of a lease in seconds.
    `attempts` is the worker's own set of unsettled attempts. The worker changes it all the time.
    """

    def __init__(
        self, queue: Queue[Any], owner: str, attempts: Collection[Attempt[Any]], *, lease: float
    ) -> None:
        self._queue = queue
        self._owner = owner
        self._attempts = attempts
        self._lease = lease

    async def run(self) -> None:
        """Beat three times in each lease, until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._repeat(self._extend_leases))
            group.create_task(self._repeat(self._pull_retries_forward))

    async def _repeat(self, operation: Callable[[], Awaitable[None]]) -> None:
        while True:
            await keep_trying(operation)
            await asyncio.sleep(self._lease / 3)

    async def _extend_leases(self) -> None:
        """Extend the leases, and cancel the attempts of tasks that another worker has re-queued.

        An attempt that is settling is left alone: it has run, and the settlement itself finds out
        that its claim was lost.
        """
        before = [*self._attempts]  # `held` may lack attempts that begin during the statement
        held = await self._queue.engine.extend(
            self._owner, now=self._queue.now(), lease=self._lease
        )
        for attempt in before:
            if attempt.key not in held and not attempt.is_settling:
                attempt.cancel()

    async def _pull_retries_forward(self) -> None:
        """Make every retry due that waits for longer than planned: the clock was set back."""
        pulled = PULLED_AT_ONCE
        while pulled == PULLED_AT_ONCE:
            pulled = await self._queue.engine.pull_forward(
                kinds=[*self._queue.registry],  # other kinds may have policies with longer waits
                now=self._queue.now(),
                longest_wait=self._queue.longest_wait,
                limit=PULLED_AT_ONCE,
            )
