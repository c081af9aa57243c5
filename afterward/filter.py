"""TaskFilter: the conditions that select tasks, for lists, counts and actions on many tasks."""

import math
from dataclasses import dataclass, replace

from afterward.bulk import Action
from afterward.task import Status, lowest_id, storable_text


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskFilter:
    """Conditions that a task must all meet. None, or an empty tuple, is no condition.

    `client` is always a condition, because a client only sees its own tasks. `not_kinds` leaves out
    the tasks of these kinds. `about` is matched exactly. `error` is the group of a failed task's
    error (see afterward.history.error_group). Times are seconds since the epoch: `since` and
    `until` select the tasks that were created at or after `since`, and before `until`;
    `unchanged_since` selects the tasks whose last change was at this time or earlier.

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
    unchanged_since: float | None = None
    allows: Action | None = None

    def acted_on(self, action: Action, accepted_at: float) -> "TaskFilter":
        """Return the filter of the tasks that an action changes if it is accepted at this time.

        These tasks had been created by then, and have not changed since. So the set can only
        become smaller. For example, a running task that fails after the acceptance is neither
        retried nor cancelled, and no task is retried twice.
        """
        # `until` itself is excluded, so take the next number above the time of acceptance.
        until = math.nextafter(accepted_at, math.inf)
        if self.until is not None:
            until = min(until, self.until)
        return replace(self, allows=action, until=until, unchanged_since=accepted_at)

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
        """The lowest id that a task created at or after `since` can have."""
        return None if self.since is None else lowest_id(self.since)

    def before_id(self, after: str | None = None) -> str | None:
        """Return an upper bound (exclusive) for the ids of this page; None if there is none.

        `after` is the last id of the page before it.
        """
        # An id only has the millisecond of its task. A task in the same millisecond as `until` may
        # have been created before `until`, so the bound must be in a later millisecond. Adding 1 ms
        # is not enough, because the sum may be rounded down to the same millisecond. So add 2 ms.
        # The condition on `created_at` leaves out the rest.
        until = None if self.until is None else lowest_id(self.until + 0.002)
        return min(filter(None, (after, until)), default=None)

    @property
    def id_after_since(self) -> str | None:
        """An id. It and all higher ids are of tasks created at or after `since`."""
        return None if self.since is None else lowest_id(self.since + 0.002)  # as in before_id

    @property
    def id_before_until(self) -> str | None:
        """An id. All lower ids are of tasks created before `until`."""
        return None if self.until is None else lowest_id(self.until)


@dataclass(frozen=True, slots=True)
class FailureGroup:
    """The failed tasks of one kind whose errors are alike."""

    kind: str
    error: str  # see afterward.history.error_group
    tasks: int


def storable_about(value: object) -> str | None:
    """Return the text to store as `about`. See storable_text."""
    return None if value is None else storable_text(str(value))
