"""The gate: who may come in, and how often."""

import math
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from ipaddress import ip_address

import structlog
from starlette.responses import Response
from starlette.types import Scope

from app.api.keys import Keys
from app.api.problems import problem

# What everybody may see: whether it lives, and its documentation.
PUBLIC = frozenset(
    ("/livez", "/readyz", "/docs", "/docs/oauth2-redirect", "/redoc", "/openapi.json")
)

NO_KEY = "Send an API key: Authorization: Bearer KEY, or X-API-Key: KEY."
WRONG_KEY = "This is none of the API keys."
STRANGER = "While it has no API keys, this service is for its own machine and network only."
TOO_OFTEN = "That was more requests than this service takes from one client."

# The last labels of names that nobody can register (RFC 6761, RFC 6762, and ICANN for `internal`).
_PRIVATE = ("localhost", "local", "internal", "test")
_BEARER = re.compile(rb"bearer +([!-~]+) *", re.IGNORECASE)

Headers = Iterable[tuple[bytes, bytes]]

log = structlog.get_logger(__name__)


class Gate:
    """A check that lets in who shows a key, as often as the rate allows.

    It notes whose the request is. Where there are no keys, everybody who reaches the port may come
    in; but not the web pages that somebody's browser visits, which reach it through that browser.
    """

    def __init__(self, keys: Keys | None, rate: "Rate | None") -> None:
        self._keys = keys
        self._rate = rate

    async def __call__(self, scope: Scope) -> Response | None:
        """Look at one request."""
        state = scope["state"]
        state["client"] = ""
        if self._keys is not None:  # a pipelined request inherits what the one before it has bound
            structlog.contextvars.unbind_contextvars("client")
        if scope["path"] in PUBLIC:
            return None
        try:
            state["client"] = client = self._client(scope["headers"])
            if self._rate is not None:
                quota = await self._rate.take(client or _address(scope))
                state["answer_headers"] += quota.headers
                if not quota.allowed:
                    raise Refused(429, TOO_OFTEN, {"Retry-After": str(quota.seconds)})
        except Refused as refused:
            status, detail, headers = refused.args
            log.info("refused", status=status, path=scope["path"], address=_address(scope))
            return problem(scope["path"], status, detail, headers=headers)
        return None

    def _client(self, headers: Headers) -> str:
        """Whose request it is; nobody's where there are no keys. Raises Refused."""
        if self._keys is None:
            if _is_from_elsewhere(headers):
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
    """At most so many requests in a while, for each who: "600/minute" and the like.

    Over a sliding window, so that the turn of the minute is no moment for twice as many. Each
    process counts for itself.
    """

    def __init__(self, limit: str) -> None:
        # Imported where a limit is asked for: it takes a thirtieth of the start.
        from limits import parse
        from limits.aio.storage import MemoryStorage
        from limits.aio.strategies import SlidingWindowCounterRateLimiter

        self._limit = parse(limit)
        self._requests = SlidingWindowCounterRateLimiter(MemoryStorage())

    async def take(self, who: str) -> "Quota":
        """Count a request, unless it is one too many."""
        allowed = await self._requests.hit(self._limit, who)
        next_at, left = await self._requests.get_window_stats(self._limit, who)
        seconds = max(1, math.ceil(next_at - time.time()))
        amount, window = self._limit.amount, self._limit.get_expiry()
        return Quota(
            allowed,
            seconds,
            [
                # draft-ietf-httpapi-ratelimit-headers-10
                (b"ratelimit-policy", b'"default";q=%d;w=%d' % (amount, window)),
                (b"ratelimit", b'"default";r=%d;t=%d' % (left, seconds)),
            ],
        )


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


def _is_from_elsewhere(headers: Headers) -> bool:
    """Whether a web page of another place is behind it."""
    found = dict(headers)
    return _leads_elsewhere(found.get(b"host", b""), found.get(b"origin"))


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


def _address(scope: Scope) -> str:
    return scope["client"][0] if scope.get("client") else ""
