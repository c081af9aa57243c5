"""A circuit breaker: while an outside service is away, the tasks that need it wait together."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto

FIRST_PAUSE_SECONDS = 1.0
LONGEST_PAUSE_SECONDS = 30.0
JITTER = 0.8  # a pause takes this part of its length at least, so that workers do not march in step


class Admits(Enum):
    """How many tasks of a kind a worker may claim."""

    ALL = auto()
    ONE = auto()  # a probe
    NONE = auto()


class Ended(Enum):
    """How an attempt ended, as far as the service is concerned."""

    WORKED = auto()  # with success, or with an error that is not about the service
    AWAY = auto()
    UNKNOWN = auto()  # it was cancelled before it could tell


@dataclass(frozen=True, slots=True)
class Pass:
    """The permission under which an attempt began: in which phase, and whether as the probe."""

    phase: int
    is_probe: bool


class Breaker:
    """Says whether tasks of one kind may run; the clock comes with each question.

              an attempt finds the service away          the pause is over
        CLOSED ----------------------------------> OPEN --------------------> HALF-OPEN
          ^   all tasks run                         ^   no task is begun        |     |
          |                                         |   (1 s, 2 s, ... 30 s)    |     |
          |                                         +---------------------------+     |
          |                                           the probe finds it away         |
          +---------------------------------------------------------------------------+
                      the probe, which is one task, ends in any other way

    With ten tasks at once, ten may find the service away within a moment. The first one opens the
    breaker; the others began before it opened, and change nothing. So do attempts that end in the
    next phase or later, such as one whose connection took 30 s to time out.
    """

    def __init__(self, uniform: Callable[[float, float], float] = random.uniform) -> None:
        self._uniform = uniform
        self._phase = 0  # counts the changes between closed and open
        self._pauses = 0  # in a row; 0: closed
        self._opened_at = 0.0  # when the present pause began
        self._resumes_at = 0.0
        self._probing = False
        self.away_since: float | None = None  # None: closed

    def admits(self, now: float) -> Admits:
        """Say how many tasks may be claimed at this time."""
        if self.away_since is None:
            return Admits.ALL
        return Admits.NONE if self._probing or self.pause_left(now) > 0 else Admits.ONE

    def pause_left(self, now: float) -> float:
        """Seconds until a probe may be claimed; 0 while no pause lasts.

        A pause that seems to begin in the future is over: the clock was set back.
        """
        if self.away_since is None or not self._opened_at <= now < self._resumes_at:
            return 0.0
        return self._resumes_at - now

    def begin(self) -> Pass:
        """An attempt begins. While the breaker is half-open, it is the probe."""
        is_probe = self.away_since is not None and not self._probing
        self._probing = self._probing or is_probe
        return Pass(self._phase, is_probe)

    def end(self, allowed: Pass, how: Ended, now: float) -> None:
        """An attempt has ended."""
        if allowed.phase != self._phase:
            return
        if allowed.is_probe:
            self._probing = False
        if how is Ended.AWAY and (allowed.is_probe or self.away_since is None):
            self._open(now)
        elif how is Ended.WORKED and allowed.is_probe:
            self._close()

    def _open(self, now: float) -> None:
        # 2.0**64 is far beyond the longest pause, and 2.0**1024 does not fit a float.
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
