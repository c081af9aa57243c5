"""Sends events to other processes, and receives theirs, with NOTIFY. Delivery is not guaranteed."""

import asyncio
import json
import math
import time
import uuid
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any

import structlog

from afterward.errors import QueueError
from afterward.events import Event, EventType, Subscriber, tell
from afterward.task import TASK_FIELDS, Status, Task, to_json

CHANNEL = "afterward_events"
_MAX_BYTES = 7999  # of a payload, because PostgreSQL requires less than 8,000
_GATHER_SECONDS = 0.02  # to wait for further events that can share a notification
_MOST_UNSENT = 10_000  # events, while the database is slow; then the oldest are dropped
_SENT_AT_ONCE = 500  # events
_SILENCE_SECONDS = 1.0  # to send nothing after no other process was listening
_UNSENT_FIELDS = {"arguments", "history"}  # they can be long, and no subscriber reads them
_SENT_FIELDS = tuple(name for name in TASK_FIELDS if name not in _UNSENT_FIELDS)

log = structlog.get_logger(__name__)

GapSubscriber = Callable[[float], None]


class EventRelay:
    """Sends the events of this process to the others, and passes theirs on to its subscribers.

    `notify` sends payloads to the channel, and returns whether another process listens. `read`
    returns the task with an id. The lists of subscribers belong to the caller, who may add some.

    A payload is JSON: the id of the sender, and then events. Each event is a list of its type, the
    duration of the attempt in seconds, and the fields of the task that are not None:

        ["9f3c…", ["started", null, {"id": "0197…", "kind": "send_email", "status": "running", …}]]
    """

    def __init__(
        self,
        notify: Callable[[Sequence[str]], Awaitable[bool]],
        read: Callable[[str], Awaitable[Task]],
        subscribers: Sequence[Subscriber] = (),
        gap_subscribers: Sequence[GapSubscriber] = (),
    ) -> None:
        self._notify = notify
        self._read = read
        self._sender_id = uuid.uuid4().hex
        self._beginning = f'["{self._sender_id}"'  # of each payload
        self._subscribers = subscribers
        self._gap_subscribers = gap_subscribers
        self._unsent: deque[str] = deque(maxlen=_MOST_UNSENT)
        self._is_sending = False
        self._has_dropped = False
        self._silent_until = -math.inf
        self._gap: tuple[float, asyncio.TimerHandle] | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    def publish(self, event: Event) -> None:
        """Send an event soon, unless no other process was listening a moment ago."""
        if event.type is EventType.LOST:  # the task has not changed
            return
        if time.monotonic() < self._silent_until:
            return
        # Encode it now, so that no large result and no traceback waits with it.
        try:
            encoded = _encode(event, at_most=_MAX_BYTES - len(self._beginning) - len(",]"))
        except ValueError as error:  # a number that JSON does not have
            log.warning("event not sent", task_id=event.task.id, error=repr(error))
            return
        drops = len(self._unsent) == _MOST_UNSENT
        self._unsent.append(encoded)
        if not self._is_sending:
            self._is_sending = True
            self._run(self._send_all())
        if drops and not self._has_dropped:
            self._has_dropped = True
            log.warning("the database is slow, so events for other processes are dropped")

    def tell_of_gap(self, since: float) -> None:
        """Tell the subscribers that events since then may be lost, as soon as events arrive again.

        This process listens from now on, but the others may send nothing for _SILENCE_SECONDS more,
        until they ask again whether a process listens.
        """
        if self._gap is not None:
            earlier, call = self._gap
            call.cancel()
            since = min(since, earlier)
        loop = asyncio.get_running_loop()
        wait = _SILENCE_SECONDS + _GATHER_SECONDS
        self._gap = since, loop.call_later(wait, self._tell_of_gap_now, since)

    def _tell_of_gap_now(self, since: float) -> None:
        self._gap = None
        tell(self._gap_subscribers, since, gap_since=since)

    def receive(self, payload: str) -> None:
        """Pass on the events of a payload, unless this process has sent it."""
        sender, *events = json.loads(payload)
        if sender == self._sender_id:
            return
        for event in events:
            try:
                self._receive_event(*event)
            except (TypeError, ValueError) as error:
                # A newer version may send types and fields that this one does not know.
                log.debug("event dropped, it is unknown here", error=repr(error))

    def _receive_event(self, event_type: str, seconds: float | None, facts: dict[str, Any]) -> None:
        if len(facts) == 1:  # the id alone, because the task was too long to be sent
            self._run(self._read_and_deliver(EventType(event_type), seconds, **facts))
        else:
            task = Task(**facts | {"status": Status(facts["status"]), "arguments": ""})
            self._deliver(Event(EventType(event_type), task, seconds))

    async def finish(self) -> None:
        """Wait until all events are sent or dropped."""
        if self._gap is not None:
            self._gap[1].cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _run(self, coroutine: Awaitable[None]) -> None:
        task = asyncio.ensure_future(coroutine)
        self._tasks.add(task)  # because the event loop keeps only a weak reference
        task.add_done_callback(self._tasks.discard)

    async def _send_all(self) -> None:
        """Send events until there are none. There is one sender, so that their order stays."""
        try:
            while self._unsent:
                await asyncio.sleep(_GATHER_SECONDS)
                at_once = min(len(self._unsent), _SENT_AT_ONCE)
                await self._send([self._unsent.popleft() for _ in range(at_once)])
        finally:
            self._is_sending = False

    async def _send(self, events: Sequence[str]) -> None:
        try:
            if not await self._notify(self._payloads(events)):
                self._silent_until = time.monotonic() + _SILENCE_SECONDS
            self._has_dropped = False
        except QueueError as error:
            log.debug("events not sent", events=len(events), error=repr(error))

    def _payloads(self, events: Iterable[str]) -> list[str]:
        """Join encoded events to payloads, with as many events in each payload as fit."""
        payloads = [self._beginning]
        for event in events:
            if len(payloads[-1]) + len(",") + len(event) + len("]") > _MAX_BYTES:
                payloads.append(self._beginning)
            payloads[-1] += f",{event}"
        return [payload + "]" for payload in payloads]

    async def _read_and_deliver(
        self,
        event_type: EventType,
        seconds: float | None,
        id: str,  # noqa: A002 - the name of the task's field
    ) -> None:
        try:
            self._deliver(Event(event_type, await self._read(id), seconds))
        except QueueError as error:
            log.debug("event dropped, its task cannot be read", task_id=id, error=repr(error))

    def _deliver(self, event: Event) -> None:
        tell(self._subscribers, event, task_id=event.task.id, event_type=event.type)


def _encode(event: Event, *, at_most: int) -> str:
    """Encode an event as JSON; if that is longer than `at_most`, with the id of the task alone."""
    # JSON is ASCII here, so characters are bytes.
    facts = {name: fact for name in _SENT_FIELDS if (fact := getattr(event.task, name)) is not None}
    encoded = to_json([event.type, event.seconds, facts])
    if len(encoded) > at_most:
        encoded = to_json([event.type, event.seconds, {"id": event.task.id}])
    return encoded
