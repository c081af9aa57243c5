"""Log lines about tasks: a line for each change, but a line a minute for repeated deferrals."""

import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import structlog

from afterward.errors import ServiceUnavailable, TaskError
from afterward.events import Event, EventType
from afterward.task import Task

SUM_UP_SECONDS = 60.0  # deferrals of one cause within this time are one line

_LEVELS = {
    EventType.QUEUED: logging.DEBUG,
    EventType.STARTED: logging.DEBUG,
    EventType.PROGRESSED: logging.DEBUG,
    EventType.RETRYING: logging.WARNING,
    EventType.FAILED: logging.ERROR,
    EventType.RECOVERED: logging.WARNING,
    EventType.GIVEN_BACK: logging.WARNING,
    EventType.LOST: logging.WARNING,
}

log = structlog.get_logger("afterward")


class TaskLog:
    """Writes a log line for each change of a task: `queue.events.subscribe(TaskLog().write)`.

    A deferral is a TemporaryError, after which the task is tried again. An operator need not act on
    it, and an hour of greylisting defers thousands of mails. So the first deferral of a cause is
    logged at once, with its task. Further ones are counted, and are one line a minute: "tasks
    deferred". At level DEBUG, each deferral is a line.

    `now` returns seconds of a clock that never goes back.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._deferrals: dict[tuple[str, ...], _Deferrals] = {}

    def write(self, event: Event) -> None:
        """Write a line about an event, or count it."""
        if self._deferrals:
            self._sum_up()
        level = _LEVELS.get(event.type, logging.INFO)
        if event.type is EventType.RETRYING and isinstance(event.exception, TaskError):
            level = self._level_of_deferral(event.task, event.exception)
        if logging.root.isEnabledFor(level):
            line = f"task {event.type}"
            log.log(level, line, **_facts(event))

    def _level_of_deferral(self, task: Task, error: TaskError) -> int:
        # The worker logs the outage itself: when it begins, once a minute, and when it ends.
        if isinstance(error, ServiceUnavailable):
            return logging.DEBUG
        # The stored error, because the `facts` of a subclass may be any object. The detail is no
        # part of the cause, because it may name the recipient of the mail.
        stored = _error_of(task) | {"detail": None}
        cause = (task.kind, *map(str, stored.values()))
        if counted := self._deferrals.get(cause):
            counted.add(task)
            return logging.DEBUG
        self._deferrals[cause] = _Deferrals(task.kind, self._now())
        return logging.WARNING

    def _sum_up(self) -> None:
        """Write a line for each cause after its minute. Forget a cause without new deferrals."""
        now = self._now()
        for cause, counted in [*self._deferrals.items()]:
            if now - counted.since < SUM_UP_SECONDS:
                continue
            if counted.tasks == 0:
                del self._deferrals[cause]
                continue
            log.warning(
                "tasks deferred",
                kind=counted.kind,
                count=counted.tasks,
                seconds=round(now - counted.since),
                error=counted.last_error,
            )
            self._deferrals[cause] = _Deferrals(counted.kind, now)


@dataclass(slots=True)
class _Deferrals:
    """The deferrals of one cause since its last line."""

    kind: str
    since: float
    tasks: int = 0
    last_error: Any = None

    def add(self, task: Task) -> None:
        """Count one more deferral."""
        self.tasks += 1
        self.last_error = _error_of(task)


def _facts(event: Event) -> dict[str, Any]:
    task = event.task
    facts: dict[str, Any] = {"task_id": task.id, "kind": task.kind, "attempt": task.attempts}
    if task.request_id is not None:
        facts["request_id"] = task.request_id
    if task.client:
        facts["client"] = task.client
    if event.seconds is not None:
        facts["seconds"] = round(event.seconds, 4)
    if task.error is not None:
        facts["error"] = _error_of(task)
    if task.next_attempt_at is not None:
        facts["next_attempt_in"] = round(task.next_attempt_at - task.updated_at, 3)
    # Only an unexpected error needs its traceback.
    if event.type in (EventType.RETRYING, EventType.FAILED) and not isinstance(
        event.exception, TaskError
    ):
        facts["exc_info"] = event.exception
    return facts


def _error_of(task: Task) -> Any:
    return None if task.error is None else json.loads(task.error)
