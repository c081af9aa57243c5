"""A circuit breaker: while an outside service is away, all tasks that need it wait."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto

FIRST_PAUSE_SECONDS = 1.0
LONGEST_PAUSE_SECONDS = 30.0
# A pause lasts for a random part of its length, from 0.8 to 1, so that several workers do not probe
# together.
JITTER = 0.8


class Admits(Enum):
    """The number of tasks of a kind that a worker may claim."""

    ALL = auto()
    ONE = auto()  # a probe
    NONE = auto()


class Ended(Enum):
    """The end of an attempt, as far as the service is concerned."""

    # The attempt succeeded, or raised any error but ServiceUnavailable: for example, the server
    # replied 450 to the recipient of a mail, or the attempt took too long.
    WORKED = auto()
    AWAY = auto()
    UNKNOWN = auto()  # the worker cancelled the attempt


@dataclass(frozen=True, slots=True)
class Permit:
    """Given to an attempt when it begins: the breaker's phase, and whether it is the probe."""

    phase: int
    is_probe: bool


class Breaker:
    """Decides whether tasks of one kind may run. The caller passes the time, in seconds.

              an attempt finds the service away          the pause is over
        CLOSED ----------------------------------> OPEN --------------------> HALF-OPEN
          ^   all tasks are claimed                 ^   none is claimed         |  one is claimed:
          |                                         |   (1 s, 2 s, ... 30 s)    |  the probe
          |                                         +---------------------------+     |
          |                                        the probe finds the service away   |
          +---------------------------------------------------------------------------+
                          the probe succeeds, or fails for another reason

    If the worker cancels the probe, the breaker stays half-open, and the next task is the probe. A
    task that was claimed before the pause may begin during it. The first such task is a probe too.

    With ten slots, ten attempts may find the service away at almost the same time. The first of
    them opens the breaker. The other nine began in the phase before, so they change nothing. The
    same holds for an attempt whose connection takes 30 s to time out, and which ends some phases
    later.
    """

    def __init__(self, uniform: Callable[[float, float], float] = random.uniform) -> None:
        self._uniform = uniform
        self._phase = 0  # goes up with each opening and each closing
        self._pauses = 0  # in a row; 0 while closed
        self._opened_at = 0.0  # begin and end of the current pause
        self._resumes_at = 0.0
        self._probing = False
        self.away_since: float | None = None
        """The time of the first failed attempt of the outage; None while closed."""

    def admits(self, now: float) -> Admits:
        """Return how many tasks may be claimed now."""
        if self.away_since is None:
            return Admits.ALL
        return Admits.NONE if self._probing or self.pause_left(now) > 0 else Admits.ONE

    def pause_left(self, now: float) -> float:
        """Return the seconds until a probe may be claimed; 0 without a pause.

        A pause that begins in the future counts as over, because the clock was set back.
        """
        if self.away_since is None or not self._opened_at <= now < self._resumes_at:
            return 0.0
        return self._resumes_at - now

    def begin(self) -> Permit:
        """Note that an attempt begins. If the service is away, the first attempt is the probe."""
        is_probe = self.away_since is not None and not self._probing
        self._probing = self._probing or is_probe
        return Permit(self._phase, is_probe)

    def end(self, permit: Permit, how: Ended, now: float) -> None:
        """Note how an attempt ended; open or close the breaker accordingly."""
        if permit.phase != self._phase:
            return
        if permit.is_probe:
            self._probing = False
        if how is Ended.AWAY and (permit.is_probe or self.away_since is None):
            self._open(now)
        elif how is Ended.WORKED and permit.is_probe:
            self._close()

    def _open(self, now: float) -> None:
        # The exponent is bounded, because 2.0**1024 does not fit a float.
        length = min(LONGEST_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 2.0 ** min(self._pauses, 64))
        self._pauses += 1
        self._phase += 1
        self._opened_at = now
        self._resumes_at = now + length * self._uniform(JITTER, 1.0)
        if self.away_since is None:
            self.away_since = now

    def _close(self) -> None:
        self._phase += 1
        self._pauses = 0
        self.away_since = None
