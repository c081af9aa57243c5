"""Calls that come in while one is under way share the next: one transaction for all of them."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

from afterward.errors import QueueUnavailable

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")


class Batcher(Generic[ItemT, ResultT]):
    """Hands items to `write`, as many at once as have come in.

    `write` gives a result for each item, in order; one that is an exception is raised to whoever
    brought the item. If `write` itself raises, the items are written again one by one, so that
    one that cannot be written spoils none of the others; but for QueueUnavailable, which all get.
    """

    def __init__(
        self, write: Callable[[Sequence[ItemT]], Awaitable[Sequence[ResultT | Exception]]]
    ) -> None:
        self._write = write
        self._waiting: list[tuple[ItemT, asyncio.Future[ResultT]]] = []
        self._writing: asyncio.Task[None] | None = None

    async def __call__(self, item: ItemT) -> ResultT:
        """Have an item written; once begun it is written, even if the caller is cancelled."""
        done: asyncio.Future[ResultT] = asyncio.get_running_loop().create_future()
        self._waiting.append((item, done))
        if self._writing is None:
            self._writing = asyncio.create_task(self._write_all(), name="batcher")
        return await done

    async def finish(self) -> None:
        """Wait until everything that was asked for is written."""
        if self._writing is not None:
            await self._writing

    async def _write_all(self) -> None:
        # The next turn of the loop begins here, so that all the callers of this one come along.
        while self._waiting:
            batch, self._waiting = self._waiting, []
            await self._write_batch(batch)
        self._writing = None

    async def _write_batch(self, batch: list[tuple[ItemT, "asyncio.Future[ResultT]"]]) -> None:
        results: Sequence[ResultT | Exception]
        try:
            results = await self._write([item for item, _ in batch])
        except Exception as error:  # noqa: BLE001 - each caller gets it
            if len(batch) > 1 and not isinstance(error, QueueUnavailable):
                for one in batch:
                    await self._write_batch([one])
                return
            results = [error] * len(batch)
        for (_, done), result in zip(batch, results, strict=True):
            if done.done():  # its caller was cancelled
                continue
            if isinstance(result, Exception):
                done.set_exception(result)
            else:
                done.set_result(result)
