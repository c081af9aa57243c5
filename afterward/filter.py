"""TaskFilter: the conditions that select tasks, for lists, counts and actions on many tasks."""

from dataclasses import dataclass

from afterward.task import Status, lowest_id

MOST_ABOUT = 255  # characters of a task's `about` that are stored


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskFilter:
    """Conditions that a task must all meet. None, or an empty tuple, is no condition.

    `client` is always a condition, because a client only sees its own tasks. `about` is matched
    exactly. `error` is the group of a failed task's error (see afterward.history.error_group).
    `since` and `until` are seconds since the epoch: tasks that were created at or after `since`,
    and before `until`.
    """

    client: str = ""
    statuses: tuple[Status, ...] = ()
    kind: str | None = None
    about: str | None = None
    batch_id: str | None = None
    request_id: str | None = None
    error: str | None = None
    since: float | None = None
    until: float | None = None

    @property
    def is_by_value(self) -> bool:
        """Whether there is a condition that few tasks meet."""
        return not (self.about is None and self.batch_id is None and self.request_id is None)

    @property
    def selects_states(self) -> bool:
        """Whether tasks of some statuses are left out."""
        return bool(self.statuses or self.error is not None)

    @property
    def possible_statuses(self) -> tuple[Status, ...]:
        """The statuses that a task can have: only failed tasks are in a group of errors."""
        statuses = self.statuses or tuple(Status)
        return statuses if self.error is None else tuple({Status.FAILED} & {*statuses})

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
