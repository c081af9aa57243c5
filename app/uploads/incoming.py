"""Writes a stream into a store block by block, counts and hashes it, and keeps all or nothing."""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import Protocol

from app.uploads.store import Received, StoreError, UploadTooLarge

# Bytes in one write. Large enough that 1 GiB needs only about a thousand thread switches, and small
# enough that each upload may hold two blocks in memory.
BLOCK = 1024 * 1024


class Incoming(Protocol):
    """One upload while it is written: opened, written, and then either kept or discarded.

    Methods are called one at a time and are never cancelled, because a thread or a server finishes
    what it has begun. They raise StoreFull or StoreUnavailable.
    """

    async def open(self) -> None:
        """Begin the upload."""
        ...

    async def write(self, block: bytearray, digest: Callable[[bytearray], None]) -> None:
        """Write the next block, and call `digest` with it. The caller does not use it again.

        If a thread writes the block, the same thread calls `digest`, because waking another thread
        takes as long as the write.
        """
        ...

    async def keep(self) -> None:
        """Make the complete upload durable, and give it its final name."""
        ...

    async def discard(self) -> None:
        """Remove everything, at whatever point the upload stopped or failed."""
        ...


async def write_stream(upload: Incoming, chunks: AsyncIterator[bytes], *, limit: int) -> Received:
    """Write a stream as `Store.receive` promises. Holds at most two blocks in memory.

    For example, a file of 2.5 MiB has three blocks. While the second arrives, the first is written.
    While the rest arrives, the second is written. The last 0.5 MiB is written on its own, and then
    the file is kept. Only one step runs at a time, so each step begins with a wait for the last.

    A cancellation does not reach a running step, because of `shield`.
    """
    sha256 = hashlib.sha256()
    step = asyncio.ensure_future(upload.open())
    try:
        # 1. Collect chunks into a block. Write a full block while the next chunks arrive.
        #    Only the first block grows with its chunks, so that a client which sends little holds
        #    little memory. The others have their size from the start: a bytearray that grows is
        #    moved in memory again and again, which cost some processes a fifth of the speed.
        block, filled, size = bytearray(), 0, 0
        async for chunk in chunks:
            size += len(chunk)
            if size > limit:
                raise UploadTooLarge
            block[filled : filled + len(chunk)] = chunk  # it may extend the block
            filled += len(chunk)
            if filled >= BLOCK:
                await asyncio.shield(step)
                step = asyncio.ensure_future(upload.write(block, sha256.update))
                block, filled = bytearray(BLOCK), 0
        # 2. Write the rest, which may be empty, and keep the upload.
        del block[filled:]
        await asyncio.shield(step)
        step = asyncio.ensure_future(upload.write(block, sha256.update))
        await asyncio.shield(step)
        step = asyncio.ensure_future(upload.keep())
        await asyncio.shield(step)
    except BaseException:
        # 3. After an error or a cancellation, discard the upload once the running step has ended.
        await asyncio.shield(_discard_after(step, upload.discard))
        raise
    return Received(size, sha256.hexdigest())


async def _discard_after(
    step: asyncio.Future[None], discard: Callable[[], Awaitable[None]]
) -> None:
    """Discard an upload after its running step has ended, with or without an error.

    A thread cannot be cancelled, and must not write to a file that is closed already. If the
    discarding fails too, the caller still sees the first error, and `sweep` removes the file later.
    """
    await asyncio.wait([step])
    step.exception()  # marks it as seen; otherwise asyncio would log it
    with suppress(StoreError):
        await discard()
