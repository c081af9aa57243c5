"""The feed hands each change of a task to the event streams that follow it."""

import asyncio
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self

from afterward.events import Event, EventType
from afterward.task import FINISHED, Task
from app.api.schemas import TaskView

QUIET_SECONDS = 5.0  # without a change, after which a stream sends a heartbeat
# The limits of one reader. A single batch is 1,000 changes of about 500 bytes at once.
MOST_UNREAD = 5_000
MOST_UNREAD_BYTES = 2 * 1024 * 1024
_AT_ONCE_BYTES = 16 * 1024  # of what a reader takes in one step


@dataclass(frozen=True, slots=True)
class Change:
    """A task as it stands after a change, in JSON; without the task's arguments.

    `id` is the event's id. It begins with the time of the change, so a client's last id says how
    far this client has read.
    """

    id: str
    task_id: str
    updated_at: float
    finished: bool
    data: bytes

    @classmethod
    def of(cls, task: Task) -> Self:
        """Serialise a task, once for all the readers of the change."""
        return cls(
            id=event_id(task.updated_at, task.id),
            task_id=task.id,
            updated_at=task.updated_at,
            finished=task.status in FINISHED,
            data=TaskView.of(task).model_dump_json().encode(),
        )


def event_id(at: float, task_id: str = "") -> str:
    """Return the id of an event: seconds since the epoch, and the task that changed."""
    return f"{at:.6f}-{task_id}"


class Reader:
    """The changes that wait to be sent to one stream.

    `async for changes in reader` gives the changes that wait, in order, a few at a time. After
    QUIET_SECONDS without any it gives an empty list. It ends when the reader is let go.
    """

    def __init__(self) -> None:
        self._unread: deque[Change] = deque()
        self._unread_bytes = 0
        self._news = asyncio.Event()
        self._let_go = False
        self.fell_behind = False
        """Whether changes were left out, because the client reads too slowly."""

    def __aiter__(self) -> Self:
        """Return the reader."""
        return self

    async def __anext__(self) -> Sequence[Change]:
        """Wait for changes."""
        if not self._unread and not self._let_go:
            self._news.clear()
            try:
                async with asyncio.timeout(QUIET_SECONDS):
                    await self._news.wait()
            except TimeoutError:
                return []
        if not self._unread:
            raise StopAsyncIteration
        return self._take()

    def _take(self) -> Sequence[Change]:
        """Take the oldest changes, up to _AT_ONCE_BYTES, and one at least."""
        taken: list[Change] = []
        left = _AT_ONCE_BYTES
        while self._unread and left > 0:
            change = self._unread.popleft()
            left -= len(change.data)
            taken.append(change)
        self._unread_bytes -= sum(len(change.data) for change in taken)
        return taken

    def give(self, change: Change) -> bool:
        """Add a change. Returns False if the reader has fallen behind, and has been let go."""
        self._unread.append(change)
        self._unread_bytes += len(change.data)
        if len(self._unread) > MOST_UNREAD or self._unread_bytes > MOST_UNREAD_BYTES:
            self.fell_behind = True
            self.abandon()
            return False
        self._news.set()
        return True

    def let_go(self) -> None:
        """End the reader once it has given the changes that still wait."""
        self._let_go = True
        self._news.set()

    def abandon(self) -> None:
        """End the reader at once, and forget the changes that still wait."""
        self._unread.clear()
        self._unread_bytes = 0
        self.let_go()


class EventStream:
    """Hands the events of the queue to readers; `listen` is a listener of the queue.

    Each reader follows one client's tasks, or a single task. The feed compares the client when it
    gives a change to a reader, so a reader never holds a change that its client may not see.
    """

    def __init__(self) -> None:
        self._readers: dict[tuple[str, str | None], set[Reader]] = {}
        self._closed = False

    def publish(self, event: Event) -> None:
        """Give a change to its readers. A lost attempt has changed nothing, and is left out."""
        if not self._readers:
            return
        task = event.task
        followed = [
            follows
            for follows in ((task.client, None), (task.client, task.id))
            if follows in self._readers
        ]
        if not followed or event.type is EventType.LOST:
            return
        change = Change.of(task)
        for follows in followed:
            for reader in tuple(self._readers[follows]):
                if not reader.give(change):
                    self._remove(follows, reader)

    def close(self) -> None:
        """Let every reader go, because a server that stops waits for its responses to end."""
        self._closed = True
        for readers in self._readers.values():
            for reader in readers:
                reader.let_go()

    @contextmanager
    def reader(self, client: str, task_id: str | None = None) -> Iterator[Reader]:
        """Follow the changes of a client's tasks, or of one of them, inside a `with` block."""
        follows, reader = (client, task_id), Reader()
        self._readers.setdefault(follows, set()).add(reader)
        if self._closed:
            reader.let_go()
        try:
            yield reader
        finally:
            self._remove(follows, reader)

    def _remove(self, follows: tuple[str, str | None], reader: Reader) -> None:
        readers = self._readers.get(follows, set())
        readers.discard(reader)
        if not readers:
            self._readers.pop(follows, None)
