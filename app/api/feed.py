"""The changes of tasks, as they happen, for any number of readers."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager

from app.queue.events import Event, What
from app.queue.task import Task

QUIET_SECONDS = 3.0  # after which a reader may look for itself
# A reader further behind than this is let go, and may come back. A batch alone is 1,000 at once.
MOST_UNREAD = 10_000


class Feed:
    """Hands the queue's events to readers; `listen` is a listener of the queue."""

    def __init__(self) -> None:
        self._readers: set[asyncio.Queue[Task | None]] = set()
        self._closed = False

    def listen(self, event: Event) -> None:
        """Pass a change on; an attempt that had lost its task changed nothing."""
        if event.what is not What.LOST:
            for reader in tuple(self._readers):
                if reader.qsize() < MOST_UNREAD:
                    reader.put_nowait(event.task)
                else:
                    self._let_go(reader)

    def close(self) -> None:
        """End every reading: a server that stops waits for its responses to end."""
        self._closed = True
        for reader in tuple(self._readers):
            self._let_go(reader)

    def _let_go(self, reader: "asyncio.Queue[Task | None]") -> None:
        self._readers.discard(reader)
        reader.put_nowait(None)

    @contextmanager
    def changes(self) -> Iterator[AsyncIterator[Task | None]]:
        """Read every change from now on, inside `with feed.changes() as changes:`.

        After each while in which nothing changed comes a None.
        """
        reader: asyncio.Queue[Task | None] = asyncio.Queue()
        self._readers.add(reader)
        if self._closed:
            self._let_go(reader)
        try:
            yield _read(reader)
        finally:
            self._readers.discard(reader)


async def _read(reader: "asyncio.Queue[Task | None]") -> AsyncIterator[Task | None]:
    while True:
        try:
            task = await asyncio.wait_for(reader.get(), QUIET_SECONDS)
        except TimeoutError:
            yield None
        else:
            if task is None:
                return
            yield task
