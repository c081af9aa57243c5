"""The event stream of the service, which is opened again whenever the connection is lost."""

import json
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass

import httpx2

from app.terminal.client import Client, Lost, task_path
from app.terminal.output import Json, Trouble

PAUSE = 3.0  # seconds before the stream is opened again, unless the service sets another time
LONGEST_PAUSE = 60.0
MOST_REMEMBERED = 5_000  # changes, so that one that comes twice is shown once

Report = Callable[[str], None]


@dataclass(frozen=True)
class Event:
    """An event of the stream: `task` or `end` with a task, `gap` with the detail."""

    name: str
    data: Json


class _Place:
    """The place in the stream: the id of the last event, and the pause before a reconnect."""

    def __init__(self) -> None:
        self.last_event_id: str | None = None
        self.pause = PAUSE
        self._read: dict[str, None] = {}  # the ids of the newest changes, oldest first
        self.has_connected = False  # whether the service has accepted a connection
        self.is_lost = False  # whether that connection has been lost since

    def advance(self, event: httpx2.ServerSentEvent) -> None:
        """Note an event that has arrived."""
        self.last_event_id = event.id or self.last_event_id
        if event.retry is not None:
            self.pause = min(max(event.retry, 0), LONGEST_PAUSE * 1000) / 1000

    def has_read(self, event: httpx2.ServerSentEvent) -> bool:
        """Return whether this change of a task came before, and note it.

        After a reconnect the service sends some changes again, with the same id.
        """
        if event.event != "task":
            return False
        is_repeated = event.id in self._read
        self._read[event.id] = None
        if len(self._read) > MOST_REMEMBERED:
            del self._read[next(iter(self._read))]
        return is_repeated


def follow(client: Client, task_id: str | None, report: Report) -> Iterator[Event]:
    """Yield the events of one task until its `end`, or of all tasks without an end.

    If the connection is lost, a line goes to `report`, and the stream goes on after the last event.
    Raises Trouble if the first connection fails, or if the service refuses a later one.
    """
    path = "/events" if task_id is None else f"{task_path(task_id)}/events"
    place = _Place()
    while True:
        try:
            if (yield from _read(client, path, place, report)):
                return
            reason = "The service has closed the event stream."
        except Lost as error:
            if not place.has_connected:
                raise Trouble(str(error)) from error
            reason = str(error)
        if not place.is_lost:
            report(f"{reason} Connecting again ...")
        place.is_lost = True
        time.sleep(place.pause)


def _read(client: Client, path: str, place: _Place, report: Report) -> Generator[Event, None, bool]:
    """Yield the events of one connection. Return whether the task has ended.

    The service answers 204 to a client that has read the end of the task before.
    """
    with client.events(path, place.last_event_id) as source:
        if place.is_lost:
            report("Connected again.")
        place.has_connected, place.is_lost = True, False
        if source.response.status_code == httpx2.codes.NO_CONTENT:
            return True
        for sent in source:
            place.advance(sent)
            if not place.has_read(sent) and (event := _parse(sent)) is not None:
                yield event
                if event.name == "end":
                    return True
    return False


def _parse(sent: httpx2.ServerSentEvent) -> Event | None:
    """Parse an event. None for a kind that is not known here."""
    if sent.event not in ("task", "end", "gap"):
        return None
    try:
        data = json.loads(sent.data)
    except (ValueError, RecursionError):
        data = None
    if not isinstance(data, dict):
        raise Trouble("The service has sent an event that is not a JSON object.")
    return Event(sent.event, data)
