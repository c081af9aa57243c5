"""How long the database was away, so that nobody is taken for dead because of it."""

import contextlib
import math
import time
from collections.abc import Iterator


class Outages:
    """Remembers for how long the database could not be reached.

    While it could not, no worker's heartbeat was written. So nobody is to be taken for dead because
    of it: when the database is back, the others are given as much longer to speak.
    """

    def __init__(self, *troubles: type[Exception]) -> None:
        self._troubles = troubles
        self._reached_at = time.monotonic()
        self._away = False
        self._ended_at = -math.inf
        self._length = 0.0

    @contextlib.contextmanager
    def noticed(self) -> Iterator[None]:
        """Notice whether the database could be reached in the block."""
        try:
            yield
        except self._troubles:
            self._away = True
            raise
        now = time.monotonic()
        if self._away:
            self._away, self._ended_at, self._length = False, now, now - self._reached_at
        self._reached_at = now

    def recent(self, within: float) -> float:
        """How many seconds the outage took that ended in the last `within` seconds, or goes on."""
        now = time.monotonic()
        if self._away:
            return now - self._reached_at
        return self._length if now - self._ended_at < within else 0.0
