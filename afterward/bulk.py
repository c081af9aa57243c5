"""Bulk actions: retry or cancel all tasks that match a filter, in slices.

One transaction for 100,000 tasks would make every request wait for seconds. So a durable task does
the work in slices of 200 tasks, and each slice is a transaction of its own. For example, 500
failed tasks are retried like this:

    slice   retries                                    writes into the record of the action
      1     the newest 200                             cursor = id of the 200th, done = 200
      2     the next 200, with ids below the cursor    cursor = id of the 400th, done = 400
      3     the last 100                               cursor = id of the 500th, done = 500

The retried tasks and the record are in one transaction. So a kill at any instant neither repeats a
slice nor loses its count: the next attempt of the durable task goes on below the cursor.

The tasks of an action are fixed by the moment at which it was accepted: TaskFilter.acted_on. A task
that has changed since, or that retention has removed, is left out. The caller also gives the number
of tasks that it has counted, and the action stops there. Without this bound, it could change more
tasks, because clocks differ, and a transaction may commit later than the times that it writes.
"""

from dataclasses import dataclass
from enum import StrEnum

from afterward.task import GIVEN_UP, WAITING, Record, Status, Task

SLICE = 200  # tasks in one transaction; on SQLite, requests wait for about 4 ms meanwhile
# The collection of the records. Retention removes a record after its task.
COLLECTION = "afterward.bulk"


class Action(StrEnum):
    """A change that a client can make to many tasks at once."""

    RETRY = "retry"  # queue failed and cancelled tasks again
    CANCEL = "cancel"  # withdraw queued and retrying tasks

    @property
    def statuses(self) -> tuple[Status, ...]:
        """The statuses in which a task allows this action."""
        return GIVEN_UP if self is Action.RETRY else WAITING


@dataclass(frozen=True, slots=True)
class Reached:
    """How far the slices of an action have come, as its record says."""

    cursor: str | None = None  # the id of the last task that was looked at
    done: int = 0  # the tasks that were changed

    @classmethod
    def of(cls, record: Record) -> "Reached":
        """Read the record of an action."""
        return cls(**record.body)

    def after(self, found: list[str], changed: int) -> "Reached":
        """Return how far the action has come after a slice: these ids, in descending order."""
        return Reached(found[-1] if found else self.cursor, self.done + changed)

    def as_record(self, task: Task, now: float) -> Record:
        """Return the record of the action that this durable task carries out."""
        body = {"cursor": self.cursor, "done": self.done}
        return Record(COLLECTION, task.client, task.id, body, now)


@dataclass(frozen=True, slots=True)
class Slice:
    """The outcome of one slice."""

    changed: tuple[Task, ...]
    """The tasks after their change, without `arguments` and `history`, which can be large."""
    done: int
    """The tasks that all slices of the action have changed so far."""
    is_last: bool
    """Whether no further task matches, or the action has changed as many as it may."""
