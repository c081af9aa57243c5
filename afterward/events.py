"""The changes of tasks as events. Log lines, metrics and event streams subscribe to them."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

import structlog

from afterward.task import Task

log = structlog.get_logger(__name__)


class EventType(StrEnum):
    """The changes that a task can go through."""

    QUEUED = "queued"
    STARTED = "started"
    PROGRESSED = "progressed"
    SUCCEEDED = "succeeded"
    RETRYING = "retrying"  # failed for now
    FAILED = "failed"  # failed for good
    CANCELLED = "cancelled"
    RECOVERED = "recovered"  # its worker died; it is queued again
    GIVEN_BACK = "given_back"  # its worker stopped before it was done
    LOST = "lost"  # finished by a worker that no longer held it: changed nothing


@dataclass(frozen=True, slots=True)
class Event:
    """One change, with the task as it stands after it."""

    type: EventType
    task: Task
    seconds: float | None = None  # how long the attempt took
    exception: BaseException | None = None


Listener = Callable[[Event], None]


class Events:
    """Hands each event to every listener, at once and in order.

    Listeners are functions that do not wait, because they run inside the queue. An error of one is
    logged, and changes nothing for the task or for the other listeners.
    """

    def __init__(self) -> None:
        self._listeners: list[Listener] = []

    def subscribe(self, listener: Listener) -> None:
        """Call `listener` with each event from now on."""
        self._listeners.append(listener)

    def emit(
        self, event_type: EventType, task: Task, **details: float | BaseException | None
    ) -> None:
        """Tell every listener."""
        event = Event(event_type, task, **details)  # type: ignore[arg-type]
        for listener in self._listeners:
            try:
                listener(event)
            except Exception:
                log.exception(
                    "a listener of task events fails", task_id=task.id, event_type=event_type
                )
