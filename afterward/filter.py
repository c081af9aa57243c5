"""TaskFilter: the conditions that select tasks, for lists, counts and actions on many tasks."""

import math
from dataclasses import dataclass, replace

from afterward.bulk import Action
from afterward.task import Status, lowest_id

MOST_ABOUT = 255  # characters of a task's `about` that are stored


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskFilter:
    """Conditions that a task must all meet. None, or an empty tuple, is no condition.

    `client` is always a condition, because a client only sees its own tasks. `not_kinds` leaves out
    the tasks of these kinds. `about` is matched exactly. `error` is the group of a failed task's
    error (see afterward.history.error_group). `since` and `until` are seconds since the epoch:
    tasks that were created at or after `since`, and before `until`. `finished_by` is one more time:
    tasks that ended then, or earlier.

    `allows` selects the tasks on which this action can act: for RETRY, failed and cancelled ones.
    """

    client: str = ""
    statuses: tuple[Status, ...] = ()
    kind: str | None = None
    not_kinds: tuple[str, ...] = ()
    about: str | None = None
    batch_id: str | None = None
    request_id: str | None = None
    error: str | None = None
    since: float | None = None
    until: float | None = None
    finished_by: float | None = None
    allows: Action | None = None

    def acted_on(self, action: Action, accepted_at: float) -> "TaskFilter":
        """Return the filter of the tasks on which an action acts that was accepted at this time.

        A retry acts on the tasks that had ended by then, a cancellation on those that had been
        created. So a task is not retried twice if it fails again during the action.
        """
        if action is Action.RETRY:
            return replace(self, allows=action, finished_by=accepted_at)
        # `until` itself is excluded, so take the next number above the time of acceptance.
        until = math.nextafter(accepted_at, math.inf)
        if self.until is not None:
            until = min(until, self.until)
        return replace(self, allows=action, until=until)

    @property
    def is_by_value(self) -> bool:
        """Whether there is a condition that few tasks meet."""
        return not (self.about is None and self.batch_id is None and self.request_id is None)

    @property
    def selects_states(self) -> bool:
        """Whether tasks of some statuses are left out."""
        return bool(self.statuses or self.error is not None or self.allows)

    @property
    def possible_statuses(self) -> tuple[Status, ...]:
        """The statuses that a task can have: only failed tasks are in a group of errors."""
        statuses = set(self.statuses or Status)
        if self.error is not None:
            statuses &= {Status.FAILED}
        if self.allows is not None:
            statuses &= set(self.allows.statuses)
        return tuple(sorted(statuses))

    @property
    def first_id(self) -> str | None:
        """An id that no task since `since` is below, because ids begin with the time."""
        return None if self.since is None else lowest_id(self.since)

    def before_id(self, after: str | None = None) -> str | None:
        """Return an id that is above all tasks until `until`, and not above the id `after`.

        A page of tasks begins below `after`, the last id of the page before it.
        """
        # An id has the millisecond of its task. A task of the same millisecond as `until` can be
        # created before it, so go on to the next one; and to the second, because 1 ms more can be
        # rounded to the same millisecond.
        until = None if self.until is None else lowest_id(self.until + 0.002)
        return min(filter(None, (after, until)), default=None)


@dataclass(frozen=True, slots=True)
class FailureGroup:
    """The failed tasks of one kind whose errors are alike."""

    kind: str
    error: str  # see afterward.history.error_group
    tasks: int
    newest: str  # the id of a task with this error


def storable_about(value: object) -> str | None:
    """Return the text to store as `about`, of at most MOST_ABOUT characters.

    PostgreSQL stores no NUL, and neither database stores half of a surrogate pair.
    """
    if value is None:
        return None
    text = str(value)[:MOST_ABOUT].replace("\0", "")
    return text.encode(errors="replace").decode()
