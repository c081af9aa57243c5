"""One circuit breaker for each kind of task, and the log lines about an outage."""

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import structlog

from afterward.call import describe
from afterward.circuit_breaker import Admits, Breaker, Ended, Permit
from afterward.errors import ServiceUnavailable
from afterward.task import Task

LOG_AGAIN_SECONDS = 60.0  # the shortest time between two lines about one outage

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class OutageEnd:
    """The end of an outage: the service that a kind of task needs is back."""

    kind: str
    away_for: float  # seconds


class Pauses:
    """Pauses each kind of task while its service is away. `now` returns seconds since the epoch.

    Each worker has its own pauses, because a service that one machine cannot reach may be in reach
    of another.
    """

    def __init__(self, kinds: Iterable[str], now: Callable[[], float]) -> None:
        self._now = now
        self._breakers = {kind: Breaker() for kind in kinds}
        self._logged_at: dict[str, float] = {}

    def kinds(self, admits: Admits) -> list[str]:
        """Return the kinds whose breaker now admits this number of tasks."""
        now = self._now()
        return [kind for kind, breaker in self._breakers.items() if breaker.admits(now) is admits]

    def next_end(self) -> float | None:
        """Return the seconds until the first pause ends; None without a pause."""
        now = self._now()
        pauses = [breaker.pause_left(now) for breaker in self._breakers.values()]
        return min(filter(None, pauses), default=None)

    def begin(self, kind: str) -> Permit:
        """Note that an attempt of this kind begins. Its permit goes to `end`."""
        return self._breakers[kind].begin()

    def end(
        self, task: Task, permit: Permit, error: BaseException | None, *, called_off: bool
    ) -> OutageEnd | None:
        """Note how an attempt ended, and log an outage. Return the OutageEnd if this ended one.

        `called_off` means that the worker cancelled the attempt. Then it tells nothing about the
        service.
        """
        breaker, now = self._breakers[task.kind], self._now()
        away_since = breaker.away_since
        breaker.end(permit, _ended(error, called_off=called_off), now)
        if isinstance(error, ServiceUnavailable) and breaker.away_since is not None:
            self._log_outage(task, error, began=away_since is None)
        if away_since is None or breaker.away_since is not None:
            return None
        return OutageEnd(task.kind, max(0.0, now - away_since))

    def resumes_at(self, kind: str) -> float | None:
        """Return the end of this kind's pause, in seconds since the epoch; None without a pause."""
        now = self._now()
        left = self._breakers[kind].pause_left(now)
        return now + left if left else None

    def _log_outage(self, task: Task, error: ServiceUnavailable, *, began: bool) -> None:
        now = self._now()
        if began or not 0 <= now - self._logged_at[task.kind] < LOG_AGAIN_SECONDS:
            self._logged_at[task.kind] = now
            # An attempt is settled even if its log line cannot be written.
            with contextlib.suppress(Exception):
                log.warning(
                    "a service is away, its tasks wait" if began else "a service is still away",
                    kind=task.kind,
                    task_id=task.id,
                    error=describe(error),
                )


def _ended(error: BaseException | None, *, called_off: bool) -> Ended:
    if called_off:
        return Ended.UNKNOWN
    return Ended.AWAY if isinstance(error, ServiceUnavailable) else Ended.WORKED
