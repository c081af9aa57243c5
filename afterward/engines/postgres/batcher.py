"""Batches writes: items that arrive during a write share the next one, and its transaction."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

from afterward.errors import QueueUnavailable

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")


class Batcher(Generic[ItemT, ResultT]):
    """Calls `write` with all the items that have arrived since its last call.

    For example, if 60 requests call the batcher while a write is under way, the next call writes
    60 items in one transaction.

    `write` returns a result for each item, in their order. A result that is an exception is raised
    for the caller that brought the item. If `write` itself raises QueueUnavailable, all callers get
    this error. After any other error each item is written again in a call of its own, so that an
    item which cannot be written does not affect the others.
    """

    def __init__(
        self, write: Callable[[Sequence[ItemT]], Awaitable[Sequence[ResultT | Exception]]]
    ) -> None:
        self._write = write
        self._waiting: list[tuple[ItemT, asyncio.Future[ResultT]]] = []
        self._writing: asyncio.Task[None] | None = None

    async def __call__(self, item: ItemT) -> ResultT:
        """Write an item, and return its result. It is written even if the caller is cancelled."""
        future: asyncio.Future[ResultT] = asyncio.get_running_loop().create_future()
        self._waiting.append((item, future))
        if self._writing is None:
            self._writing = asyncio.create_task(self._write_all(), name="batcher")
        return await future

    async def finish(self) -> None:
        """Wait until all items are written. If this is cancelled, the writing goes on."""
        if self._writing is not None:
            await asyncio.wait([self._writing])

    async def _write_all(self) -> None:
        # The task begins in the next iteration of the event loop. So the first batch has the items
        # of all callers of this iteration.
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
                for entry in batch:
                    await self._write_batch([entry])
                return
            results = [error] * len(batch)
        for (_, future), result in zip(batch, results, strict=True):
            if future.done():  # its caller was cancelled
                continue
            if isinstance(result, Exception):
                future.set_exception(result)
            else:
                future.set_result(result)
