"""The gate: who may come in, and how often."""

import math
import re
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from functools import lru_cache
from ipaddress import IPv6Address, IPv6Network, ip_address

import structlog
from starlette.responses import Response
from starlette.types import Scope

from app.api.errors import problem
from app.api.paths import route_path
from app.api.routes import documentation
from app.hardening.api_keys import Keys

# Open to everybody: the health checks and the documentation.
PUBLIC = frozenset(("/livez", "/readyz", *documentation.PATHS))

NO_KEY = "Send an API key: Authorization: Bearer KEY, or X-API-Key: KEY."
WRONG_KEY = "This is none of the API keys."
STRANGER = "While it has no API keys, this service is for its own machine and network only."
TOO_OFTEN = "That was more requests than this service takes from one client."

MOST_COUNTED = 50_000  # clients whose requests are counted; about 15 MB
ROUNDING = 1e-6  # seconds by which a sum of fractions may be off
_SECONDS = {"second": 1, "minute": 60, "hour": 3600, "day": 86_400}
# An answer that depends on a key is for nobody else: no cache in between may pass it on. For
# Authorization that is so anyway (RFC 9111, 3.5); of X-API-Key a cache knows nothing.
_PRIVATE_ANSWER = [(b"cache-control", b"private"), (b"vary", b"Authorization, X-API-Key")]

# The last labels of names that nobody can register (RFC 6761, RFC 6762, and ICANN for `internal`).
_PRIVATE = ("localhost", "local", "internal", "test")
_BEARER = re.compile(rb"bearer +([!-~]+) *", re.IGNORECASE)

Headers = Iterable[tuple[bytes, bytes]]

log = structlog.get_logger(__name__)


class Gate:
    """A check that lets in a client with a key, as often as the rate allows.

    It notes which client sent the request. Without keys the service is open to everybody who
    reaches the port, except for web pages: they reach it through the browser of a visitor. Pages of
    the `origins` are let in.
    """

    def __init__(
        self, keys: Keys | None, rate: "Rate | None", origins: Collection[str] = ()
    ) -> None:
        self._keys = keys
        self._rate = rate
        self._origins = frozenset(origin.encode() for origin in origins)

    async def __call__(self, scope: Scope) -> Response | None:
        """Look at one request."""
        state = scope["state"]
        state["client"] = ""
        if self._keys is not None:  # a pipelined request inherits what the one before it has bound
            structlog.contextvars.unbind_contextvars("client")
        if route_path(scope) in PUBLIC:
            return None
        if self._keys is not None:
            state["answer_headers"] += _PRIVATE_ANSWER
        try:
            state["client"] = client = self._client(scope["headers"])
            if self._rate is not None:
                quota = self._rate.take(client or _network(_address(scope)))
                state["answer_headers"] += quota.headers
                if not quota.allowed:
                    raise Refused(429, TOO_OFTEN, {"Retry-After": str(quota.seconds)})
        except Refused as refused:
            status, detail, headers = refused.args
            log.info("refused", status=status, path=scope["path"], address=_address(scope))
            return problem(scope["path"], status, detail, headers=headers)
        return None

    def _client(self, headers: Headers) -> str:
        """Give the client of a request; an empty name without keys. Raises Refused."""
        if self._keys is None:
            if _is_from_elsewhere(headers, self._origins):
                raise Refused(403, STRANGER, {})
            return ""
        keys = _presented(headers)
        if not keys:
            raise Refused(401, NO_KEY, {"WWW-Authenticate": "Bearer"})
        client = self._keys.client_of(keys[0]) if len(keys) == 1 else None
        if client is None:
            raise Refused(401, WRONG_KEY, {"WWW-Authenticate": 'Bearer error="invalid_token"'})
        structlog.contextvars.bind_contextvars(client=client)
        return client


class Refused(Exception):
    """Not let in: the status, the reason, and the headers that go with it."""


class Rate:
    """Limits the requests of each client: `limit` is "600/minute" and the like.

    Requests are counted in a fixed window and in the one before it, whose count weighs as much as
    the part of it that lies within the last `window` seconds. So the turn of the minute is no
    moment for twice as many. For example, of 600/minute, 400 came in the last minute and 100 in the
    first 15 s of this one: 400 * 0.75 + 100 = 400, and 200 more are allowed now.

    Each process counts for itself. It counts `most_counted` clients; for one more it forgets the
    client that has been silent for longest.
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
        # For each client: the number of the window, the count in the one before, the count in it.
        self._counts: OrderedDict[str, tuple[float, int, int]] = OrderedDict()

    def take(self, client: str) -> "Quota":
        """Count a request, unless it is one too many."""
        window_number, elapsed = divmod(self._now(), self._window)
        before, current = self._counted(client, window_number)
        used = before * (1 - elapsed / self._window) + current
        allowed = used < self._amount
        if allowed:
            current, used = current + 1, used + 1
        self._counts[client] = (window_number, before, current)
        self._counts.move_to_end(client)
        if len(self._counts) > self._most_counted:
            self._counts.popitem(last=False)
        left = max(0, math.ceil(self._amount - used))
        next_at = self._window if left else self._room_at(before, current)
        seconds = int(next_at - elapsed + ROUNDING) + 1  # for at that very moment there is none yet
        return Quota(
            allowed,
            seconds,
            [
                # draft-ietf-httpapi-ratelimit-headers-10
                (b"ratelimit-policy", b'"default";q=%d;w=%d' % (self._amount, self._window)),
                (b"ratelimit", b'"default";r=%d;t=%d' % (left, seconds)),
            ],
        )

    def _counted(self, client: str, window_number: float) -> tuple[int, int]:
        """Give the client's requests in the window before this one, and in this one so far."""
        number, before, current = self._counts.get(client, (window_number, 0, 0))
        if number == window_number:
            return before, current
        return (current, 0) if number == window_number - 1 else (0, 0)

    def _room_at(self, before: int, current: int) -> float:
        """Tell how long after the start of this window one more request is allowed, in seconds."""
        if current >= self._amount:
            return self._window
        return self._window * (1 - (self._amount - current) / before)


@dataclass(frozen=True, slots=True)
class Quota:
    """Whether a request is allowed, the seconds until more are, and the headers that say so."""

    allowed: bool
    seconds: int
    headers: list[tuple[bytes, bytes]]


def _presented(headers: Headers) -> list[bytes]:
    """The keys that came with a request: more than one is one too many, or no key at all."""
    keys = []
    for name, value in headers:
        if name == b"x-api-key":
            keys.append(value)
        elif name == b"authorization":
            match = _BEARER.fullmatch(value)
            keys.append(match[1] if match else b"")
    return keys


def _is_from_elsewhere(headers: Headers, origins: Collection[bytes]) -> bool:
    """Whether a web page of another place is behind it, and that place is none of `origins`."""
    found = dict(headers)
    origin = found.get(b"origin")
    return _leads_elsewhere(found.get(b"host", b""), None if origin in origins else origin)


@lru_cache(maxsize=256)  # most requests name the same host
def _leads_elsewhere(host: bytes, origin: bytes | None) -> bool:
    """Whether a browser that names this host and this origin shows a page of another place.

    It names that place as the origin; or as the host, when the page's own name was made to lead
    here (DNS rebinding). Names with a dot can be anybody's, addresses and others cannot.
    """
    here = host.decode("latin-1").lower()
    if origin is not None and origin.decode("latin-1").lower().rpartition("/")[2] != here:
        return True
    name = here.rpartition(":")[0] if re.search(r":\d*$", here) else here
    if "." not in name or name.rstrip(".").rpartition(".")[2] in _PRIVATE:
        return False
    try:
        ip_address(name.strip("[]"))
    except ValueError:
        return True
    return False


@lru_cache(maxsize=1024)
def _network(address: str) -> str:
    """The network that one client may have for itself: of IPv6, 64 bits of the address."""
    try:
        parsed = ip_address(address)
    except ValueError:  # a Unix socket has none
        return address
    # A socket for both shows the IPv4 address 192.0.2.1 as ::ffff:192.0.2.1.
    if isinstance(parsed, IPv6Address) and parsed.ipv4_mapped is None:
        return str(IPv6Network((int(parsed), 64), strict=False))
    return address


def _address(scope: Scope) -> str:
    return scope["client"][0] if scope.get("client") else ""
