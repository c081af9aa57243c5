"""The replay: a client that returns to an event stream gets the changes that it has missed.

The client sends the id of the last event that it has read. The id begins with the time of that
change, and the database knows which tasks have changed since then. In this example, a connection
breaks just after 12:00:00:

               client                                        service

    12:00:00   reads the event "A is running"         <----  A is running
               the connection breaks
    12:00:02                                                 A has succeeded
    12:00:03   GET /events, Last-Event-ID: 12:00:00   ---->  1. open a reader: changes wait in it
    12:00:03                                                 B is queued: it waits in the reader
                                                             2. read the record: A and B have
                                                                changed since 11:59:55
               reads "A has succeeded", "B is queued" <----  3. send these, ordered by time
    12:00:04                                                 C is queued: it waits in the reader
               reads "C is queued"                    <----  4. send the changes of the reader,
                                                                without B, which was sent

The reader is opened before the record is read, so no change falls between the two. The client gets
one event for each task, with the task as it is now, and not each change on the way there. It may
get an event again that it has read before the connection broke, because step 2 goes MARGIN_SECONDS
further back.

If not all changes can be replayed, the client gets a `gap` instead: see `Replay.read_missed`.
"""

import asyncio
import re
from collections.abc import Callable, Sequence
from weakref import WeakValueDictionary

import structlog

from afterward.engine import Engine
from afterward.errors import QueueUnavailable
from afterward.task import Status, Task
from app.api.event_stream import MARGIN_SECONDS, Change, EventStream, GiveReplay, event_id

MOST_CHANGES = 5_000
MOST_BYTES = 4 * 1024 * 1024
MOST_SECONDS = 5.0  # to wait for the record
_SERIALISED_AT_ONCE = 100  # then the other requests have their turn, after about 2 ms

log = structlog.get_logger(__name__)

_EVENT_ID = re.compile(r"(\d{1,11}\.\d{6})-[\w-]{0,64}", re.ASCII)

Changes = Sequence[Change]


class Replay:
    """Reads the changes that clients have missed.

    `now` returns seconds since the epoch. Finished tasks are kept for `keep_seconds`.

    After a restart of the service, all clients return at once. So clients whose last events are
    from the same second share one read of the record, and the reads are made one after another.
    """

    def __init__(self, engine: Engine, now: Callable[[], float], keep_seconds: float) -> None:
        self._engine = engine
        self._now = now
        self._keep_seconds = keep_seconds
        self._turn = asyncio.Lock()
        self._waiting: dict[tuple[str, int], asyncio.Task[Changes | None]] = {}
        """The reads that have not begun, by the client and the time."""
        self._in_use: WeakValueDictionary[tuple[str, float, Status], Change] = WeakValueDictionary()
        """The changes that wait to be sent to any client, so that all clients share them."""
        self._catching_up: set[asyncio.Task[None]] = set()

    @property
    def position(self) -> str:
        """The id of an event at this moment, for a client that has read none yet."""
        return event_id(self._now())

    async def read_missed(self, client: str, last_event_id: str) -> Changes | None:
        """Return the changes since an event, ordered by time, or None if some would be missing.

        That is the case if the id is not an id of ours, or if its time is in the future or before
        the retention time; if there are more than MOST_CHANGES changes or MOST_BYTES; and if the
        record cannot be read within MOST_SECONDS.
        """
        since = self._time_of(last_event_id)
        if since is None:
            return None
        key = client, int(since - MARGIN_SECONDS)
        if key not in self._waiting:
            self._waiting[key] = asyncio.create_task(self._read_in_turn(*key))
        reading = self._waiting[key]
        # If one of the clients disconnects, the read goes on for the others.
        await asyncio.wait([reading])
        changes = reading.result()
        return changes and [change for change in changes if change.id != last_event_id]

    def catch_up(self, event_stream: EventStream, since: float) -> None:
        """Begin to give all readers the changes since then, because events may have been lost.

        A client whose stream ends meanwhile is told to return to this time.
        """
        task = asyncio.create_task(self._catch_up(event_stream, since))
        self._catching_up.add(task)  # because the event loop keeps only a weak reference
        task.add_done_callback(self._catching_up.discard)

    async def _catch_up(self, event_stream: EventStream, since: float) -> None:
        lost_since = event_id(since)
        await asyncio.gather(
            *(
                self._replay(client, lost_since, event_stream.expect_replay(client, lost_since))
                for client in event_stream.clients
            )
        )

    async def _replay(self, client: str, lost_since: str, give: GiveReplay) -> None:
        missed = None
        try:
            missed = await self.read_missed(client, lost_since)
        except Exception:
            log.exception("the changes that a client has missed cannot be read")
        give(missed)

    def _time_of(self, last_event_id: str) -> float | None:
        """Return the time of an event, in seconds since the epoch, or None if it is of no use."""
        parts = _EVENT_ID.fullmatch(last_event_id)
        if parts is None:
            return None
        at, now = float(parts[1]), self._now()
        return at if now - self._keep_seconds <= at <= now + MARGIN_SECONDS else None

    async def _read_in_turn(self, client: str, since: int) -> Changes | None:
        try:
            async with asyncio.timeout(MOST_SECONDS), self._turn:
                # Clients that come from now on need a later read, because this one may have
                # read the record before they opened their readers.
                del self._waiting[client, since]
                return await self._read(client, since)
        except (QueueUnavailable, TimeoutError):
            return None
        finally:
            if self._waiting.get((client, since)) is asyncio.current_task():
                del self._waiting[client, since]

    async def _read(self, client: str, since: int) -> Changes | None:
        tasks = await self._engine.list_changed(
            client, since=since, now=self._now(), limit=MOST_CHANGES
        )
        if tasks is None:
            return None
        changes: list[Change] = []
        size = 0
        for task in tasks:
            changes.append(change := self._change_of(task))
            size += len(change.data)
            if size > MOST_BYTES:
                return None
            if len(changes) % _SERIALISED_AT_ONCE == 0:
                await asyncio.sleep(0)
        return changes

    def _change_of(self, task: Task) -> Change:
        key = task.id, task.updated_at, task.status
        change = self._in_use.get(key) or Change.of(task)
        self._in_use[key] = change
        return change
