"""Pauses the kinds of tasks whose service is away, and logs the beginning and end of an outage."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import structlog

from afterward.call import describe
from afterward.circuit_breaker import Admits, Breaker, Ended, Pass
from afterward.errors import ServiceUnavailable
from afterward.task import Task

TELL_AGAIN_SECONDS = 60.0  # at least so long between two lines about one outage

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Return:
    """A service has come back."""

    kind: str
    away_for: float  # seconds


class Pauses:
    """One circuit breaker for each kind of task; `now` gives seconds since the epoch.

    Each worker has its own: an outage seen from one machine need not be one from another.
    """

    def __init__(self, kinds: Iterable[str], now: Callable[[], float]) -> None:
        self._now = now
        self._breakers = {kind: Breaker() for kind in kinds}
        self._told_at: dict[str, float] = {}

    def kinds(self, admits: Admits) -> list[str]:
        """Give the kinds of which so many tasks may be claimed now."""
        now = self._now()
        return [kind for kind, breaker in self._breakers.items() if breaker.admits(now) is admits]

    def next_end(self) -> float | None:
        """Seconds until the first pause ends; None while no pause lasts."""
        now = self._now()
        left = [left for one in self._breakers.values() if (left := one.pause_left(now))]
        return min(left, default=None)

    def begin(self, kind: str) -> Pass:
        """An attempt of this kind begins."""
        return self._breakers[kind].begin()

    def end(
        self, task: Task, allowed: Pass, error: BaseException | None, *, called_off: bool
    ) -> Return | None:
        """An attempt has ended; tells if the service is back with it."""
        breaker, now = self._breakers[task.kind], self._now()
        away_since = breaker.away_since
        breaker.end(allowed, _how_it_ended(error, called_off=called_off), now)
        if isinstance(error, ServiceUnavailable) and breaker.away_since is not None:
            self._tell(task, error, began=away_since is None)
        if away_since is None or breaker.away_since is not None:
            return None
        return Return(task.kind, max(0.0, now - away_since))

    def resumes_at(self, kind: str) -> float | None:
        """The end of the pause of this kind, in seconds since the epoch; None without a pause."""
        now = self._now()
        left = self._breakers[kind].pause_left(now)
        return now + left if left else None

    def _tell(self, task: Task, error: ServiceUnavailable, *, began: bool) -> None:
        now = self._now()
        if began or not 0 <= now - self._told_at[task.kind] < TELL_AGAIN_SECONDS:
            self._told_at[task.kind] = now
            log.warning(
                "a service is away, its tasks wait" if began else "a service is still away",
                kind=task.kind,
                task_id=task.id,
                error=describe(error),
            )


def _how_it_ended(error: BaseException | None, *, called_off: bool) -> Ended:
    if called_off:
        return Ended.UNKNOWN
    return Ended.AWAY if isinstance(error, ServiceUnavailable) else Ended.WORKED
