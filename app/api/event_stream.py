"""The event stream: hands each change of a task to the clients that follow it."""

import asyncio
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
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
MOST_REPLAYS = 3  # that wait at once: the client's own when it returns, and those of two gaps
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


@dataclass(eq=False, slots=True)
class _Part:
    """Changes that wait in a reader, oldest first: those of a replay, or those published since."""

    changes: deque[Change] = field(default_factory=deque)
    is_replay: bool = False
    is_expected: bool = False
    """Whether the changes of the replay are still being read from the record."""
    lost_since: str | None = None
    """The position before a replay of which no change was given yet."""


GiveReplay = Callable[[Iterable[Change] | None], None]


class Reader:
    """The changes that wait to be sent to one client.

    `async for changes in reader` gives the waiting changes in order, a few at a time. After
    QUIET_SECONDS without a change it gives an empty list. It ends when the reader is closed.

    If changes are lost, a replay of them is expected. The changes from then on wait until it has
    been given, so that no change of a task comes after a later one. Until the replay has begun, the
    client's `position` is before the lost changes.
    """

    def __init__(self) -> None:
        self._parts = deque([_Part()])
        self._unread = self._unread_bytes = 0  # without the replays
        self._replayed: dict[str, float] = {}
        """For each replayed task, the time of the change that was replayed."""
        self._replayed_until = -math.inf
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
                while (part := self._next_part()) is None and not self._closed:
                    self._news.clear()
                    await self._news.wait()
        except TimeoutError:
            return []
        if part is None:
            raise StopAsyncIteration
        return self._take(part)

    def _next_part(self) -> _Part | None:
        """Return the part with the next changes, or None if there are none, or not yet."""
        part = self._parts[0]
        while len(self._parts) > 1 and not part.changes and not part.is_expected:
            self._parts.popleft()
            part = self._parts[0]
        return part if part.changes else None

    def _take(self, part: _Part) -> Sequence[Change]:
        """Remove the next changes, and return those that are newer than what a replay has sent."""
        part.lost_since = None  # from here on, the ids of these changes are the position
        taken = _take_oldest(part.changes)
        self.last_id = taken[-1].id
        # Older ones come soon after the replay, or not at all.
        if taken[0].updated_at > self._replayed_until + MARGIN_SECONDS:
            self._replayed.clear()
        replayed_at = self._replayed
        changes = [c for c in taken if c.updated_at > replayed_at.get(c.task_id, -math.inf)]
        if part.is_replay:
            self._replayed |= {change.task_id: change.updated_at for change in changes}
            self._replayed_until = taken[-1].updated_at
        else:
            self._unread -= len(taken)
            self._unread_bytes -= sum(len(change.data) for change in taken)
        return changes

    @property
    def position(self) -> str:
        """The id with which the client should return: the replay has all changes after it."""
        lost = [part.lost_since for part in self._parts if part.lost_since is not None]
        return min([self.last_id, *lost], key=_time_of)

    def expect_replay(self, lost_since: str) -> GiveReplay:
        """Hold the changes from now on back, because changes after this position are lost.

        The function that is returned takes the lost changes, ordered by time, or None if they
        cannot be read. The reader falls behind then, and if it has too many replays to give.
        """
        part = _Part(is_replay=True, is_expected=True, lost_since=lost_since)
        if sum(part.is_replay for part in self._parts) == MOST_REPLAYS:
            self.fall_behind()
        if self._closed:
            self.discard()  # else a change that still waits would raise the position again
            self.last_id = min(self.last_id, lost_since, key=_time_of)
        else:
            self._parts += part, _Part()

        def give(missed: Iterable[Change] | None) -> None:
            if self._closed:
                return
            if missed is None:
                self.fall_behind()
                return
            part.changes.extend(missed)
            part.is_expected = False
            if not part.changes:
                part.lost_since = None
            self._news.set()

        return give

    def add(self, change: Change) -> bool:
        """Add a change. Returns False if the reader is closed, perhaps because it falls behind now.

        A closed reader takes none: its client returns to its position, which may be before a replay
        that was not given to its end.
        """
        if self._closed:
            return False
        self._parts[-1].changes.append(change)
        self._unread += 1
        self._unread_bytes += len(change.data)
        if self._unread > MOST_UNREAD or self._unread_bytes > MOST_UNREAD_BYTES:
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

        If there is a replay among them, end it at once. The client returns to its position, where
        the next replay begins.
        """
        if any(part.is_expected or (part.is_replay and part.changes) for part in self._parts):
            self.discard()
        else:
            self._end()

    def discard(self) -> None:
        """End the reader at once, and drop the changes that still wait."""
        self.last_id = self.position
        self._parts = deque([_Part()])
        self._unread = self._unread_bytes = 0
        self._end()

    def _end(self) -> None:
        self._closed = True
        self._news.set()


def _time_of(event_id: str) -> float:
    """Return the time of an event. An id of another form, which a client may send, counts as late.

    So it is not taken for a position.
    """
    try:
        return float(event_id.partition("-")[0])
    except ValueError:
        return math.inf


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

    def expect_replay(self, client: str, lost_since: str) -> GiveReplay:
        """Let a client's readers expect the changes after this position, because they are lost.

        The function that is returned takes these changes, or None if they cannot be read; then the
        readers end with a `gap`. A reader of a single task needs nothing, because its stream also
        reads the task now and then.
        """
        topic = client, None
        expecting = [
            (reader, reader.expect_replay(lost_since))
            for reader in tuple(self._readers.get(topic, ()))
        ]

        def give(missed: Iterable[Change] | None) -> None:
            for reader, give_to in expecting:
                give_to(missed)
                if reader.fell_behind:
                    self._remove(topic, reader)

        return give

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
