"""Tracks outages of the database, so that they do not make leases expire."""

import contextlib
import math
import time
from collections.abc import Iterator


class Outages:
    """Measures for how long the database could not be reached.

    No worker can write its heartbeat during an outage, and its lease may expire although it is
    alive. So the length of an outage is added to every lease. For example, with a lease of 30 s and
    an outage of 40 s, a task is re-queued 70 s after the last heartbeat of its worker.

    `errors` are the exceptions that mean that the database cannot be reached.
    """

    def __init__(self, *errors: type[Exception]) -> None:
        self._errors = errors
        self._reached_at = time.monotonic()
        self._is_away = False
        self._ended_at = -math.inf
        self._seconds = 0.0

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        """Notice whether the database can be reached in the `with` block."""
        try:
            yield
        except self._errors:
            self._is_away = True
            raise
        now = time.monotonic()
        if self._is_away:
            self._is_away, self._ended_at, self._seconds = False, now, now - self._reached_at
        self._reached_at = now

    def recent_seconds(self, within: float) -> float:
        """Return the length of the current outage, or of the last one if it ended recently.

        Recently means in the last `within` seconds. Returns 0 if there was no outage in that time.
        """
        now = time.monotonic()
        if self._is_away:
            return now - self._reached_at
        return self._seconds if now - self._ended_at < within else 0.0
