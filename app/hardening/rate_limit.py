"""The rate limit of each client, RATE_LIMIT."""

import math
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

MOST_COUNTED = 50_000  # clients whose requests are counted; about 15 MB
ROUNDING = 1e-6  # seconds by which a sum of fractions may be off
_SECONDS = {"second": 1, "minute": 60, "hour": 3600, "day": 86_400}


class RateLimit:
    """Limits the requests of each client: `limit` is "600/minute", for example.

    This is a sliding-window counter. Requests are counted in fixed windows. The count of the
    previous window is weighted by the share of that window which lies within the last `window`
    seconds, so a client cannot send twice the limit around a window's end. For example, with
    600/minute, 400 requests in the last minute, and 100 in the first 15 s of this one:
    400 * 0.75 + 100 = 400 are used, so the client may send 200 more now.

    Each process counts on its own. It counts at most `most_counted` clients; for a further one it
    forgets the client that has been silent for the longest time.
    """

    def __init__(
        self,
        limit: str,
        *,
        most_counted: int = MOST_COUNTED,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        amount, _, window = limit.partition("/")
        self._amount, self._window = int(amount), _SECONDS[window]
        self._most_counted = most_counted
        self._now = now
        # For each client: the number of its latest window, the count in the window before that
        # one, and the count in that one.
        self._counts: OrderedDict[str, tuple[float, int, int]] = OrderedDict()

    def count_request(self, client: str) -> "Quota":
        """Count a request of `client`, unless it is over the limit."""
        window_number, elapsed = divmod(self._now(), self._window)
        before, current = self._counts_of(client, window_number)
        used = before * (1 - elapsed / self._window) + current
        allowed = used < self._amount
        if allowed:
            current, used = current + 1, used + 1
        self._counts[client] = (window_number, before, current)
        self._counts.move_to_end(client)
        if len(self._counts) > self._most_counted:
            self._counts.popitem(last=False)
        left = max(0, math.ceil(self._amount - used))
        next_at = self._window if left else self._next_allowed_at(before, current)
        # One more second, because at exactly that moment no request is allowed yet.
        seconds = int(next_at - elapsed + ROUNDING) + 1
        return Quota(
            allowed,
            seconds,
            [
                # draft-ietf-httpapi-ratelimit-headers-10
                (b"ratelimit-policy", b'"default";q=%d;w=%d' % (self._amount, self._window)),
                (b"ratelimit", b'"default";r=%d;t=%d' % (left, seconds)),
            ],
        )

    def _counts_of(self, client: str, window_number: float) -> tuple[int, int]:
        """Return the client's requests in the previous window, and in this one so far."""
        number, before, current = self._counts.get(client, (window_number, 0, 0))
        if number == window_number:
            return before, current
        return (current, 0) if number == window_number - 1 else (0, 0)

    def _next_allowed_at(self, before: int, current: int) -> float:
        """Return when the next request is allowed, in seconds since the start of this window."""
        if current >= self._amount:
            return self._window
        return self._window * (1 - (self._amount - current) / before)


@dataclass(frozen=True, slots=True)
class Quota:
    """The state of a client's rate limit after a request.

    `allowed` tells whether this request is within the limit. After `seconds`, the client may send
    more requests. `headers` tell the client how many requests are left, and these seconds.
    """

    allowed: bool
    seconds: int
    headers: list[tuple[bytes, bytes]]
