"""Retry policies: when a failed task is tried again, and when it fails for good."""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

from afterward.errors import PermanentError, TaskError
from afterward.task import Task, to_json

MAX_CRASHES = 3  # in a row; then the task fails
WORKER_DIED = to_json({"type": "WorkerDied", "detail": "the process died while it ran this task"})


@dataclass(frozen=True, slots=True)
class Bounds:
    """The bound of a task's retries, as it is stored with the task: attempts, or a time."""

    max_attempts: int | None = None
    gives_up_at: float | None = None  # seconds since the epoch


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Exponential back-off with full jitter, bounded by attempts or by time.

    After attempt n the worker waits for a random time between 0 and base * 2**(n-1) seconds, at
    most `maximum`. With a base of 1 and a maximum of 900, that is up to 1 s, 2 s, 4 s ... 15
    minutes. Because the whole wait is random (full jitter), a thousand tasks that failed together
    are tried again evenly spread (Brooker, "Exponential Backoff and Jitter", 2015).

    A task fails after `attempts` attempts. With `give_up_after`, in seconds, time is the bound
    instead, as RFC 5321 (4.5.4.1) asks for mail: the task is tried again after any number of
    TemporaryErrors, for the last time when the time is over. Then only unexpected errors count
    against `attempts`, because these are most likely bugs.

    With `attempts=1`, and without `give_up_after`, a task runs at most once. If a crash or a stop
    interrupts it, the task fails, and only a person can retry it.

    `uniform(low, high)` draws the random wait; tests replace it.
    """

    attempts: int = 8
    base: float = 1.0
    maximum: float = 900.0
    give_up_after: float | None = None
    uniform: Callable[[float, float], float] = random.uniform

    def __post_init__(self) -> None:
        """Check the values. Raises ValueError, and TypeError for a value that is no number."""
        if not all(map(math.isfinite, (self.base, self.maximum, self.give_up_after or 0))):
            raise ValueError("base, maximum and give_up_after must be finite numbers")
        if self.attempts < 1 or self.base < 0 or self.maximum < 0:
            raise ValueError("attempts must be 1 or more; base and maximum 0 seconds or more")
        if self.give_up_after is not None and self.give_up_after <= 0:
            raise ValueError("give_up_after must be more than 0 seconds, or None")

    def bounds(self, now: float) -> Bounds:
        """Return the bounds of a task that is accepted, or retried by hand, at this time."""
        if self.give_up_after is None:
            return Bounds(max_attempts=self.attempts)
        return Bounds(gives_up_at=now + self.give_up_after)

    def next_attempt_at(
        self, task: Task, error: BaseException, now: float, *, resumes_at: float | None = None
    ) -> float | None:
        """Return the time of the next attempt, or None if the task fails for good.

        `task` is the task as it was claimed: its `attempts` include the one that raised `error`,
        its `errors` do not. During an outage, `resumes_at` replaces the random wait. Times are in
        seconds since the epoch.
        """
        if isinstance(error, PermanentError) or self._is_spent(task, error, now):
            return None
        if resumes_at is None:
            resumes_at = now + self.uniform(0.0, self.ceiling(task.attempts))
        return resumes_at if task.gives_up_at is None else min(resumes_at, task.gives_up_at)

    def _is_spent(self, task: Task, error: BaseException, now: float) -> bool:
        if task.max_attempts is not None:
            return task.attempts >= task.max_attempts
        if task.gives_up_at is not None and now >= task.gives_up_at:
            return True
        return is_unexpected(error) and task.errors + 1 >= self.attempts

    def ceiling(self, attempt: int) -> float:
        """Return the longest wait after this attempt, in seconds."""
        # The exponent is bounded, because 2.0**1024 does not fit a float.
        return min(self.maximum, self.base * 2.0 ** min(attempt - 1, 64))


def is_unexpected(error: BaseException) -> bool:
    """Whether an error is most likely a bug, because no task raised it on purpose."""
    return not isinstance(error, TaskError)
