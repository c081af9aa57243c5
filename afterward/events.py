"""The changes of tasks as events. Log lines, metrics and event streams subscribe to them."""

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeVar

import structlog

from afterward.task import Task

MessageT = TypeVar("MessageT")

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
    PULLED_FORWARD = "pulled_forward"  # RETRYING, and its next attempt is due now: a client asked
    RECOVERED = "recovered"  # re-queued, because its worker crashed; it is RETRYING
    GIVEN_BACK = "given_back"  # its worker stopped first; it is QUEUED again
    LOST = "lost"  # it ended on a worker that had lost its claim, so nothing was written


@dataclass(frozen=True, slots=True)
class Event:
    """One change, and the task after it.

    In events of a bulk action or of another process, its `arguments` may be empty, and its
    `history` None. In a LOST event, it is the task as the worker claimed it.
    """

    type: EventType
    task: Task
    seconds: float | None = None  # the length of an attempt that has ended
    exception: BaseException | None = None


Subscriber = Callable[[Event], None]


class Events:
    """Calls every subscriber with each event, at once and in order.

    A subscriber is a plain function that returns quickly, because the queue waits for it. If it
    raises, the error is logged; the task and the other subscribers are not affected.
    """

    def __init__(self) -> None:
        self._subscribers: list[Subscriber] = []

    def subscribe(self, subscriber: Subscriber) -> None:
        """Call `subscriber` with each event from now on."""
        self._subscribers.append(subscriber)

    def emit(
        self, event_type: EventType, task: Task, **details: float | BaseException | None
    ) -> None:
        """Call every subscriber with a new event."""
        event = Event(event_type, task, **details)  # type: ignore[arg-type]
        tell(self._subscribers, event, task_id=task.id, event_type=event_type)


def tell(
    subscribers: Iterable[Callable[[MessageT], None]], message: MessageT, **facts: object
) -> None:
    """Call each subscriber with a message. If one raises, the error is logged with these facts."""
    for subscriber in subscribers:
        try:
            subscriber(message)
        except Exception:
            # The subscriber may be the log itself, on a full disk. A commit that has succeeded must
            # not fail because of that.
            with contextlib.suppress(Exception):
                log.exception("a subscriber of task events fails", **facts)
