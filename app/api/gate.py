"""The gate: who may come in, and how often."""

import math
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from ipaddress import ip_address

import structlog
from starlette.types import ASGIApp, Message, Receive, Scope, Send

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
    """Lets in who shows a key, as often as the rate allows, and notes whose the request is.

    Where there are no keys, everybody who reaches the port may come in; but not the web pages
    that somebody's browser visits, which reach it through that browser.
    """

    def __init__(self, app: ASGIApp, keys: Keys | None, rate: "Rate | None") -> None:
        self._app = app
        self._keys = keys
        self._rate = rate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection (ASGI)."""
        if scope["type"] == "http":
            scope["state"]["client"] = ""
            if scope["path"] not in PUBLIC:
                try:
                    scope["state"]["client"] = client = self._client(scope["headers"])
                    send = await self._counted(client or _address(scope), send)
                except Refused as refused:
                    status, detail, headers = refused.args
                    log.info("refused", status=status, path=scope["path"], address=_address(scope))
                    answer = problem(scope["path"], status, detail, headers=headers)
                    await answer(scope, receive, send)
                    return
        await self._app(scope, receive, send)

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

    async def _counted(self, who: str, send: Send) -> Send:
        """Count the request, and tell the client what is left. Raises Refused."""
        if self._rate is None:
            return send
        quota = await self._rate.take(who)
        if not quota.allowed:
            raise Refused(429, TOO_OFTEN, quota.headers | {"Retry-After": str(quota.seconds)})
        headers = [(name.lower().encode(), value.encode()) for name, value in quota.headers.items()]

        async def send_with_quota(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *headers]
            await send(message)

        return send_with_quota


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
            {
                # draft-ietf-httpapi-ratelimit-headers-10
                "RateLimit-Policy": f'"default";q={amount};w={window}',
                "RateLimit": f'"default";r={left};t={seconds}',
            },
        )


@dataclass(frozen=True, slots=True)
class Quota:
    """Whether a request is allowed, the seconds until more are, and the headers that say so."""

    allowed: bool
    seconds: int
    headers: dict[str, str]


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
