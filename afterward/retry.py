"""When to try again: a pure function of the task, its error and the time."""

import random
from collections.abc import Callable
from dataclasses import dataclass

from afterward.errors import PermanentError, TaskError
from afterward.task import Task, to_json

MAX_CRASHES = 3  # in a row
WORKER_DIED = to_json({"type": "WorkerDied", "detail": "the process died while it ran this task"})


@dataclass(frozen=True, slots=True)
class Bounds:
    """The end of trying, as it is stored with a task: a number of attempts, or a time."""

    max_attempts: int | None = None
    gives_up_at: float | None = None  # seconds since the epoch


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Exponential back-off with full jitter, bounded by attempts or by time.

    After attempt n the wait is a random time between 0 and base * 2**(n-1) seconds, at most
    `maximum`: with 1 and 900, up to 1 s, 2 s, 4 s ... a quarter of an hour. Full jitter spreads a
    thousand tasks that failed together most evenly over the time of the next attempt (Brooker,
    "Exponential Backoff and Jitter", 2015).

    A task ends after `attempts` attempts. With `give_up_after`, in seconds, the outside world has
    so much time instead, as RFC 5321 (4.5.4.1) asks for mail: however often it raises a
    TemporaryError meanwhile, the task is tried again, for the last time at the end. Only errors
    that nobody expected count then against `attempts`, because they are most likely bugs.
    """

    attempts: int = 8
    base: float = 1.0
    maximum: float = 900.0
    give_up_after: float | None = None
    uniform: Callable[[float, float], float] = random.uniform

    def bounds(self, now: float) -> Bounds:
        """Give the bounds of a task that is accepted, or retried by hand, at this time."""
        if self.give_up_after is None:
            return Bounds(max_attempts=self.attempts)
        return Bounds(gives_up_at=now + self.give_up_after)

    def next_attempt_at(
        self, task: Task, error: BaseException, now: float, *, resumes_at: float | None = None
    ) -> float | None:
        """Give the time of the next attempt, or None if there is none.

        `task` is as it was claimed, so its `attempts` count the one that raised the error and its
        `errors` do not. `resumes_at` takes the place of the random wait during an outage.
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
        """The longest wait after this attempt, in seconds."""
        # The exponent is bounded first: 2.0**1024 does not fit a float.
        return min(self.maximum, self.base * 2.0 ** min(attempt - 1, 64))


def is_unexpected(error: BaseException) -> bool:
    """Tell an error that nobody expected from one that a task raises on purpose."""
    return not isinstance(error, TaskError)
