"""Numbers, times and addresses as the pages show them: filters and functions of the templates.

board.js keeps the relative times fresh, so its function `relative` must give the same texts.
"""

import time
from datetime import UTC, datetime
from urllib.parse import parse_qsl, urlencode

from fastapi import Request
from markupsafe import Markup, escape

from app.api.paths import route_path

DASH = "\u2013"  # in place of a value that is missing

_UNITS = (("s", 1), ("min", 60), ("h", 3600), ("d", 86_400))
_SIZES = ("bytes", "kB", "MB", "GB", "TB")


def when(at: float | datetime | None, now: float | None = None) -> Markup:
    """Return a time as a <time> element: relative as text, exact in UTC on hover.

    `at` is a datetime, or seconds since the epoch. None and damaged times give a dash.
    """
    seconds = at.timestamp() if isinstance(at, datetime) else at
    exact = None if seconds is None else _in_utc(seconds)
    if seconds is None or exact is None:
        return escape(DASH)
    text = relative(seconds - (time.time() if now is None else now))
    element = Markup('<time datetime="{}" title="{}">{}</time>')
    in_json = exact.isoformat(timespec="milliseconds").replace("+00:00", "Z")
    return element.format(in_json, exact_time(seconds), text)


def exact_time(seconds: float) -> str:
    """Return a time since the epoch as "2026-01-31 12:00:00 UTC". A damaged one gives a dash."""
    exact = _in_utc(seconds)
    return DASH if exact is None else exact.strftime("%Y-%m-%d %H:%M:%S UTC")


def made_at(id: str) -> float | None:  # noqa: A002 -- the id of a task, a batch or an upload
    """Return when an id was made, in seconds since the epoch, because ids begin with the time.

    It is the first 48 bits, in milliseconds (RFC 9562, section 5.7). None for another form of id.
    """
    try:
        return int(id.replace("-", "")[:12], 16) / 1000
    except ValueError:
        return None


def _in_utc(seconds: float) -> datetime | None:
    """Return the time, or None for a damaged one, which no calendar has."""
    try:
        return datetime.fromtimestamp(seconds, UTC)
    except (ValueError, OverflowError, OSError):
        return None


def relative(seconds: float) -> str:
    """Return a distance in time as words: "4 min ago" for -250, "in 2 h" for 7300."""
    if abs(seconds) < 1:
        return "now"
    return f"in {_rounded(seconds)}" if seconds > 0 else f"{_rounded(-seconds)} ago"


def _rounded(seconds: float) -> str:
    """Return whole units, rounded down: "59 s", "1 min", "23 h", "2 d"."""
    name, length = next(unit for unit in reversed(_UNITS) if seconds >= unit[1])
    return f"{number(int(seconds // length))} {name}"


def duration(seconds: float | None) -> str:
    """Return a length of time: "0.024 s", "1.5 s", "4 min", "2 h". None gives a dash."""
    if seconds is None:
        return DASH
    if seconds < 1:
        return f"{max(0.0, seconds):.3f} s"
    return f"{seconds:.1f} s" if seconds < 60 else _rounded(seconds)  # noqa: PLR2004 -- a minute


def number(value: float) -> str:
    """Return a number with thousands separators: "1,234,567"."""
    return f"{value:,}"


def size(value: int | None) -> str:
    """Return a number of bytes: "999 bytes", "1.2 MB". None gives a dash."""
    if value is None:
        return DASH
    power = min((len(str(value)) - 1) // 3, len(_SIZES) - 1)
    if power == 0:
        return "1 byte" if value == 1 else f"{value} bytes"
    return f"{value / 1000**power:,.1f} {_SIZES[power]}"


def query_with(request: Request, **changes: str | None) -> str:
    """Return the path and query of this page with some parameters changed; None removes one.

    For example, the link to the next page of a list is `query_with(request, after=last_id)`. The
    result begins with the prefix of a proxy.
    """
    prefix: str = request.scope.get("root_path", "")
    kept = [(name, value) for name, value in parse_qsl(request.url.query) if name not in changes]
    query = urlencode([*kept, *((name, text) for name, text in changes.items() if text)])
    return prefix + route_path(request.scope) + (f"?{query}" if query else "")
