"""Brings a stream into a store: block by block, counted and hashed, and whole or not at all."""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import Protocol

from app.uploads.store import Received, StoreError, UploadTooLarge

# Large enough that a thread is woken, and the interpreter's lock taken, about a thousand times
# for a GiB; small enough that two blocks for each upload in flight are nothing.
BLOCK = 1024 * 1024


class Incoming(Protocol):
    """An upload on its way into a medium: opened, written, and then either kept or discarded.

    One verb is called at a time, and none is ever cancelled: what a thread or a server has begun,
    it ends. They raise StoreFull or StoreUnavailable.
    """

    async def open(self) -> None:
        """Begins."""
        ...

    async def write(self, block: bytearray, digest: Callable[[bytearray], None]) -> None:
        """Takes the next block, which nobody else touches from now on, and has it digested.

        In the thread that writes it, if one does: to wake another takes as long as the writing.
        """
        ...

    async def keep(self) -> None:
        """Makes the upload durable, and gives it the name that only a whole one has."""
        ...

    async def discard(self) -> None:
        """Leaves nothing of it, whichever verb has failed or was the last one."""
        ...


async def bring_in(upload: Incoming, chunks: AsyncIterator[bytes], *, limit: int) -> Received:
    """See `Store.receive`. Holds two blocks at most: one arrives while one is written."""
    sha256 = hashlib.sha256()
    step = asyncio.ensure_future(upload.open())
    try:
        block, size = bytearray(), 0
        async for chunk in chunks:
            size += len(chunk)
            if size > limit:
                raise UploadTooLarge
            block += chunk
            if len(block) >= BLOCK:
                await asyncio.shield(step)
                step = asyncio.ensure_future(upload.write(block, sha256.update))
                block = bytearray()
        await asyncio.shield(step)
        step = asyncio.ensure_future(upload.write(block, sha256.update))
        await asyncio.shield(step)
        step = asyncio.ensure_future(upload.keep())
        await asyncio.shield(step)
    except BaseException:
        await asyncio.shield(_after(step, upload.discard))
        raise
    return Received(size, sha256.hexdigest())


async def _after(step: asyncio.Future[None], discard: Callable[[], Awaitable[None]]) -> None:
    """Discards once the step before has ended, well or not.

    A thread cannot be cancelled: one that is still writing must not find its file closed. What
    went wrong before is the news, not a clean-up that failed as well; `sweep` comes again.
    """
    await asyncio.wait([step])
    step.exception()
    with suppress(StoreError):
        await discard()
