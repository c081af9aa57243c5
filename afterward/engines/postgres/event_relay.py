"""Events told to other processes, and heard from them (NOTIFY): a courtesy, not a promise."""

import asyncio
import json
import math
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import fields, replace

import structlog

from afterward.errors import QueueError
from afterward.events import Event, EventType, Subscriber
from afterward.task import Status, Task, to_json

CHANNEL = "afterward_events"
_LONGEST = 7999  # bytes of one notification: PostgreSQL takes less than 8,000
_SOON = 0.02  # seconds in which events are gathered, to be told together
_UNHEARD = 1.0  # seconds for which nothing is told after nobody was there to hear it
_TOLD = tuple(field.name for field in fields(Task) if field.name != "arguments")

log = structlog.get_logger(__name__)


class EventRelay:
    """Passes events on between processes, each but the sender's own.

    `notify` sends payloads to the channel, and says whether anybody listened; `read` gives the
    task of an id.
    """

    def __init__(
        self,
        notify: Callable[[Sequence[str]], Awaitable[bool]],
        read: Callable[[str], Awaitable[Task]],
    ) -> None:
        self._notify = notify
        self._read = read
        self._me = uuid.uuid4().hex
        self._untold: list[Event] = []
        self._unheard_until = -math.inf
        self._subscribers: tuple[Subscriber, ...] = ()
        self._tasks: set[asyncio.Task[None]] = set()

    def publish(self, event: Event) -> None:
        """Let the others know, soon; if there are any who listen."""
        if event.type is EventType.LOST:  # it changed nothing
            return
        if time.monotonic() < self._unheard_until:
            return
        # The arguments are not told, and may be large.
        self._untold.append(replace(event, task=replace(event.task, arguments="")))
        if len(self._untold) == 1:
            self._run(self._tell_all())

    def subscribe(self, subscribers: Sequence[Subscriber]) -> None:
        """Pass to these what others tell."""
        self._subscribers = tuple(subscribers)

    def receive(self, payload: str) -> None:
        """Take a payload from the channel."""
        sender, *events = json.loads(payload)
        if sender == self._me:
            return
        for what, seconds, facts in events:
            if len(facts) == 1:  # too long to be told
                self._run(self._read_up(what, seconds, **facts))
            else:
                task = Task(**facts | {"status": Status(facts["status"]), "arguments": ""})
                self._pass_on(Event(EventType(what), task, seconds))

    async def finish(self) -> None:
        """Tell what is still untold."""
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _run(self, coroutine: Awaitable[None]) -> None:
        task = asyncio.ensure_future(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _tell_all(self) -> None:
        await asyncio.sleep(_SOON)
        events, self._untold = self._untold, []
        try:
            if not await self._notify(self._payloads(events)):
                self._unheard_until = time.monotonic() + _UNHEARD
        except QueueError as error:
            log.debug("events untold", events=len(events), error=repr(error))

    def _payloads(self, events: Sequence[Event]) -> list[str]:
        """The sender and the events, in JSON, with as many in each payload as fit in."""
        beginning = f'["{self._me}"'
        payloads = [beginning]
        for event in events:
            told = "," + _told(event, at_most=_LONGEST - len(beginning) - len(",]"))
            if len(payloads[-1]) + len(told) + len("]") > _LONGEST:
                payloads.append(beginning)
            payloads[-1] += told
        return [payload + "]" for payload in payloads]

    async def _read_up(self, what: str, seconds: float | None, id: str) -> None:  # noqa: A002
        try:
            self._pass_on(Event(EventType(what), await self._read(id), seconds))
        except QueueError as error:
            log.debug("event unread", task_id=id, error=repr(error))

    def _pass_on(self, event: Event) -> None:
        for subscriber in self._subscribers:
            subscriber(event)


def _told(event: Event, *, at_most: int) -> str:
    """An event in JSON; if that is too long, with the task's id alone."""
    facts = {name: fact for name in _TOLD if (fact := getattr(event.task, name)) is not None}
    told = to_json([event.type, event.seconds, facts])
    if len(told) > at_most:
        told = to_json([event.type, event.seconds, {"id": event.task.id}])
    return told
