"""When to try again: a pure function of the attempt and the error."""

import random
from collections.abc import Callable
from dataclasses import dataclass

from app.queue.errors import PermanentError
from app.queue.task import to_json

MAX_CRASHES = 3
WORKER_DIED = to_json({"type": "WorkerDied", "detail": "the process died while it ran this task"})


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Exponential back-off with full jitter.

    After attempt n the wait is a random time between 0 and base * 2**(n-1) seconds, at most
    `maximum`: with 1 and 3600, up to 1 s, 2 s, 4 s ... an hour. Full jitter spreads a thousand
    tasks that failed together most evenly over the time of the next attempt (Brooker,
    "Exponential Backoff and Jitter", 2015).
    """

    attempts: int = 8
    base: float = 1.0
    maximum: float = 3600.0
    uniform: Callable[[float, float], float] = random.uniform

    def wait_after(self, attempt: int, max_attempts: int, error: BaseException) -> float | None:
        """Seconds until the next attempt; None if there is none."""
        if attempt >= max_attempts or isinstance(error, PermanentError):
            return None
        return self.uniform(0.0, self.ceiling(attempt))

    def ceiling(self, attempt: int) -> float:
        """The longest wait after this attempt, in seconds."""
        # The exponent is bounded first: 2.0**1024 does not fit a float.
        return min(self.maximum, self.base * 2.0 ** min(attempt - 1, 64))
