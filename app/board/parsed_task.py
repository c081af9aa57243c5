"""Conclude from the row of a task some facts that are not in it.

It tells whether the task was retried or given back, and whether attempts are missing.

A row keeps the acceptance, the newest failed attempts and the latest attempt. It does not keep
everything:

- A row has the newest 20 failed attempts (`afterward.history.MOST_KEPT`), and the older ones are
  gone.
- When a client retries a task, its attempts are counted from 1 again. The time of this is only kept
  until the next attempt begins. After that the numbers of the attempts show it: 1, 2, 3, 1, 2.
- When a worker stops, it gives its running tasks back, and these attempts do not count. The row
  counts all claims, so the number of such attempts is known, but their times are not.
"""

from dataclasses import dataclass
from typing import Self

from pydantic import TypeAdapter

from afterward.history import MOST_KEPT, failed_attempts
from afterward.task import Status, Task
from app.api.schemas import FailedAttempt

_HISTORY = TypeAdapter(list[FailedAttempt])


@dataclass(frozen=True, slots=True)
class ParsedTask:
    """A task with its parsed history, and the conclusions from both."""

    task: Task
    history: list[FailedAttempt]

    @classmethod
    def of(cls, task: Task) -> Self:
        """Parse the history of a task. A damaged one counts as empty."""
        try:
            return cls(task, _HISTORY.validate_python(failed_attempts(task.history)))
        except (ValueError, RecursionError):
            return cls(task, [])

    @property
    def has_unlisted_attempt(self) -> bool:
        """Whether the latest attempt runs or has succeeded, and so is not in the history."""
        return self.task.status in {Status.RUNNING, Status.SUCCEEDED}

    @property
    def is_unreadable(self) -> bool:
        """Whether the stored history is damaged."""
        return bool(self.task.history) and not self.history

    @property
    def unlisted_claims(self) -> int:
        """The number of attempts that are neither in the history nor the latest."""
        return self.task.claims - len(self.history) - self.has_unlisted_attempt

    @property
    def may_be_cut(self) -> bool:
        """Whether the row may have had more failed attempts than it keeps."""
        return self.unlisted_claims > 0 and len(self.history) >= MOST_KEPT

    @property
    def retried_at(self) -> float | None:
        """The time of a retry on request, until the next attempt begins.

        Acceptance and such a retry both make a task due at once, and the retry removes the start of
        the latest attempt.
        """
        task = self.task
        is_retried = task.started_at is None and task.due_at != task.created_at
        return task.due_at if is_retried else None

    @property
    def is_retried(self) -> bool:
        """Whether a client has retried the task after the last attempt of its history."""
        if self.retried_at is not None:
            return True
        last = self.history[-1].attempt if self.history else 0
        return self.task.attempts < last + self.has_unlisted_attempt

    @property
    def is_given_back(self) -> bool:
        """Whether a worker has given the task back, and no worker has claimed it since."""
        return self.task.status is Status.QUEUED and self.task.started_at is not None
