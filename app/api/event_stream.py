"""The event stream: hands each change of a task to the clients that follow it."""

import asyncio
import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self

from afterward.events import Event, EventType
from afterward.task import FINISHED, Task
from app.api.schemas import TaskView

QUIET_SECONDS = 5.0  # without a change, after which a client gets a heartbeat
# The longest time from a change to its event, and the largest difference between two machines'
# clocks, that a replay allows for.
MARGIN_SECONDS = 5.0
# The limits of one reader. A single batch makes 1,000 changes of about 500 bytes at once.
MOST_UNREAD = 5_000
MOST_UNREAD_BYTES = 2 * 1024 * 1024
_BYTES_PER_READ = 16 * 1024


@dataclass(frozen=True, slots=True, weakref_slot=True)
class Change:
    """A task as it is after a change, in JSON and without the task's arguments.

    `id` is the id of the event. It begins with the time of the change, so the last id that a client
    has read tells how far it has read.
    """

    id: str
    task_id: str
    updated_at: float
    finished: bool
    data: bytes

    @classmethod
    def of(cls, task: Task) -> Self:
        """Serialise a task. This happens once for all the readers of the change."""
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
    """The changes that wait to be sent to one client.

    `async for changes in reader` gives the waiting changes in order, a few at a time. After
    QUIET_SECONDS without a change it gives an empty list. It ends when the reader is closed.

    If changes before the last one are lost, the reader goes back: until it has given them, the
    client's `position` is before them.
    """

    def __init__(self) -> None:
        self._missed: deque[Change] = deque()
        self._replayed: dict[str, float] = {}
        """For each replayed task, the time of the change that was replayed."""
        self._replayed_until = -math.inf
        self._unread: deque[Change] = deque()
        self._unread_bytes = 0
        self._lost_since: str | None = None
        self._news = asyncio.Event()
        self._closed = False
        self.last_id = event_id(0.0)
        """The id of the last change that was given."""
        self.fell_behind = False
        """Whether changes are missing, which the reader will not give."""

    def __aiter__(self) -> Self:
        """Return the reader itself."""
        return self

    async def __anext__(self) -> Sequence[Change]:
        """Wait for changes."""
        try:
            async with asyncio.timeout(QUIET_SECONDS):
                while not (self._missed or self._unread or self._closed):
                    self._news.clear()
                    await self._news.wait()
        except TimeoutError:
            return []
        if not (self._missed or self._unread):
            raise StopAsyncIteration
        changes = self._next_missed() if self._missed else self._next_unread()
        self.last_id = changes[-1].id if changes else self.last_id
        return changes

    @property
    def position(self) -> str:
        """The id with which the client should return: the replay has all changes after it."""
        return self._lost_since or self.last_id

    def go_back(self, lost_since: str) -> None:
        """Go back to this position, because changes after it are lost. `replay` gives them."""
        self._lost_since = min(lost_since, self.position, key=_time_of)

    def replay(self, missed: Iterable[Change]) -> bool:
        """Give these lost changes first, in this order, and then the changes that are added.

        Returns False if the reader has fallen behind, because it has not read its last replay.
        """
        if self._missed:
            self.fall_behind()
            return False
        if not self._closed:
            self._missed.extend(missed)
            self._news.set()
            if not self._missed:
                self._lost_since = None
        return True

    def _next_missed(self) -> Sequence[Change]:
        self._lost_since = None  # from here on, the ids of these changes are the position
        changes = _take_oldest(self._missed)
        self._replayed |= {change.task_id: change.updated_at for change in changes}
        self._replayed_until = changes[-1].updated_at
        return changes

    def _next_unread(self) -> Sequence[Change]:
        changes = _take_oldest(self._unread)
        self._unread_bytes -= sum(len(change.data) for change in changes)
        # Skip a change if the replay has sent it already, or a later change of the same task. Such
        # changes come soon after the replay, or not at all.
        if changes[0].updated_at > self._replayed_until + MARGIN_SECONDS:
            self._replayed.clear()
        replayed_at = self._replayed
        return [c for c in changes if c.updated_at > replayed_at.get(c.task_id, -math.inf)]

    def add(self, change: Change) -> bool:
        """Add a change. Returns False if the reader has fallen behind, and is closed for that."""
        self._unread.append(change)
        self._unread_bytes += len(change.data)
        if len(self._unread) > MOST_UNREAD or self._unread_bytes > MOST_UNREAD_BYTES:
            self.fall_behind()
            return False
        self._news.set()
        return True

    def fall_behind(self) -> None:
        """End the reader at once, because changes are missing."""
        self.fell_behind = True
        self.discard()

    def close(self) -> None:
        """End the reader after the changes that still wait.

        If there are missed changes among them, end it at once. The client returns to its position,
        where the next replay begins.
        """
        if self._missed:
            self.discard()
        else:
            self._end()

    def discard(self) -> None:
        """End the reader at once, and drop the changes that still wait."""
        self._missed.clear()
        self._unread.clear()
        self._unread_bytes = 0
        self._end()

    def _end(self) -> None:
        self._closed = True
        self._news.set()


def _time_of(event_id: str) -> float:
    return float(event_id.partition("-")[0])


def _take_oldest(changes: deque[Change]) -> list[Change]:
    """Remove and return the oldest changes: about _BYTES_PER_READ, but at least one change."""
    taken: list[Change] = []
    left = _BYTES_PER_READ
    while changes and left > 0:
        taken.append(changes.popleft())
        left -= len(taken[-1].data)
    return taken


Topic = tuple[str, str | None]
"""The tasks that a reader follows: (client, None) for all of a client, (client, id) for one."""


class EventStream:
    """Hands the events of the queue to readers. `publish` is a subscriber of the queue's events.

    Each reader follows the tasks of one API client, or a single task of that client. The event
    stream compares the client before it hands out a change, so a reader never holds a change that
    its client may not see.
    """

    def __init__(self) -> None:
        self._readers: dict[Topic, set[Reader]] = {}
        self._closed = False

    def publish(self, event: Event) -> None:
        """Add the changed task to its readers.

        A lost attempt is left out, because it has not changed the task.
        """
        if not self._readers:
            return
        task = event.task
        followed = [
            topic
            for topic in ((task.client, None), (task.client, task.id))
            if topic in self._readers
        ]
        if not followed or event.type is EventType.LOST:
            return
        change = Change.of(task)
        for topic in followed:
            for reader in tuple(self._readers[topic]):
                if not reader.add(change):
                    self._remove(topic, reader)

    @property
    def clients(self) -> list[str]:
        """The clients that follow all of their tasks."""
        return [client for client, task_id in self._readers if task_id is None]

    def go_back(self, client: str, lost_since: str) -> None:
        """Let a client's readers go back to this position, because events after it are lost.

        A reader of a single task needs nothing, because its stream also reads the task now and
        then.
        """
        for reader in self._readers.get((client, None), ()):
            reader.go_back(lost_since)

    def replay(self, client: str, missed: Sequence[Change] | None) -> None:
        """Give a client's readers the changes whose events were lost.

        None means that not all of them could be read; then the readers end with a `gap`.
        """
        for reader in tuple(self._readers.get((client, None), ())):
            if missed is None:
                reader.fall_behind()
            if reader.fell_behind or not reader.replay(missed or ()):
                self._remove((client, None), reader)

    def close(self) -> None:
        """Close every reader, because a server that stops waits for its responses to end."""
        self._closed = True
        for readers in self._readers.values():
            for reader in readers:
                reader.close()

    @contextmanager
    def reader(self, client: str, task_id: str | None = None) -> Iterator[Reader]:
        """Follow the changes of a client's tasks, or of one task, inside a `with` block."""
        topic, reader = (client, task_id), Reader()
        self._readers.setdefault(topic, set()).add(reader)
        if self._closed:
            reader.close()
        try:
            yield reader
        finally:
            self._remove(topic, reader)

    def _remove(self, topic: Topic, reader: Reader) -> None:
        readers = self._readers.get(topic, set())
        readers.discard(reader)
        if not readers:
            self._readers.pop(topic, None)
