"""Access: API keys, rate limits, and protection from web pages of other sites."""

import asyncio
import re
from collections.abc import Collection, Iterable
from functools import lru_cache
from ipaddress import IPv6Address, IPv6Network, ip_address

import structlog
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api.error_pages import SIGN_IN
from app.api.errors import problem
from app.api.key_cookie import key_in_cookie
from app.api.paths import route_path
from app.api.routes import documentation
from app.api.static_files import STATIC_PATHS
from app.hardening.api_keys import ApiKeys
from app.hardening.rate_limit import RateLimit

# Paths without access control: the health checks, the documentation and the files of the pages.
PUBLIC = frozenset(("/livez", "/readyz", *documentation.PATHS, *STATIC_PATHS))

NO_KEY = "Send an API key: Authorization: Bearer KEY, or X-API-Key: KEY."
WRONG_KEY = "The API key is not valid."
FORM_OF_ANOTHER_PAGE = (
    "This request changes something, and it does not come from a page of this service. Reload the "
    "page, and send the form again. A program sends its API key in a header."
)
CROSS_SITE = (
    "This service has no API keys, so it refuses requests from web pages of other sites and "
    "requests to a public host name."
)
TOO_MANY_REQUESTS = "Too many requests. Retry-After says how many seconds to wait."

# A response to a request with a key must not reach another client from a shared cache. Caches
# follow this rule for Authorization (RFC 9111, 3.5), but they do not know X-API-Key.
_PRIVATE_RESPONSE = [
    (b"cache-control", b"private"),
    (b"vary", b"Authorization, X-API-Key, Cookie"),
]
_FORMS = ("/board/", "/inbox/")  # the pages that have forms
_SAFE_METHODS = ("GET", "HEAD", "OPTIONS", "TRACE")  # RFC 9110, section 9.2.1

KEY_CHECKED_SECONDS = 5.0  # how often an open event stream checks that its key is still valid

# Top-level domains that nobody can register (RFC 6761, RFC 6762, and ICANN for `internal`).
_PRIVATE_DOMAINS = ("localhost", "local", "internal", "test")
_BEARER = re.compile(rb"bearer +([!-~]+) *", re.IGNORECASE)

Headers = Iterable[tuple[bytes, bytes]]

log = structlog.get_logger(__name__)


class AccessCheck:
    """A check for RequestChecks: each request needs an API key, and must be within the rate limit.

    It stores the owner of the key, the client, in the state of the request. A program sends the
    key in a header. A browser that has signed in sends it in a cookie, even if the page of another
    site makes it do so. So a request with a cookie may change something only if a page of this
    service sends it.

    Without keys, everyone who reaches the port may use the service, except web pages of other
    sites. Such a page could otherwise use it through the browser of a visitor in this network.
    Pages of `origins` are allowed, but their forms may not go to the dashboard.
    """

    def __init__(
        self,
        keys: ApiKeys | None,
        rate_limit: RateLimit | None,
        origins: Collection[str] = (),
    ) -> None:
        self._keys = keys
        self._rate_limit = rate_limit
        self._origins = frozenset(origin.encode() for origin in origins)

    def __call__(self, scope: Scope) -> Response | None:
        """Check one request. Returns the response if the request is refused, or else None."""
        state = scope["state"]
        if self._keys is not None:
            # Requests of one connection share a logging context, so remove the previous client.
            structlog.contextvars.unbind_contextvars("client")
        path = route_path(scope)
        if path in PUBLIC:
            return None
        if self._keys is not None:
            state["response_headers"] += _PRIVATE_RESPONSE
        try:
            state["client"] = client = self._authenticate(scope, path)
            if self._rate_limit is not None:
                # Without keys, each network counts as one client.
                quota = self._rate_limit.count_request(client or _network(_address(scope)))
                state["response_headers"] += quota.headers
                if not quota.allowed:
                    raise Refused(429, TOO_MANY_REQUESTS, {"Retry-After": str(quota.seconds)})
        except Refused as refused:
            status, detail, headers = refused.args
            log.info("refused", status=status, path=scope["path"], address=_address(scope))
            return problem(scope["path"], status, detail, headers=headers)
        return None

    def _authenticate(self, scope: Scope, path: str) -> str:
        """Return the client that sent a request; "" where the service has no keys. Raises Refused.

        The page to sign in needs no key, either. A request with several keys is refused like one
        with a wrong key. A key in a header counts rather than the one in the cookie.
        """
        headers = scope["headers"]
        if self._keys is None:
            if _is_cross_site(headers, self._origins):
                raise Refused(403, CROSS_SITE, {})
            if path.startswith(_FORMS) and scope["method"] == "POST":
                _check_form(scope)
            return ""
        if path == SIGN_IN:
            _check_form(scope)
            return ""
        if not (sent := _keys_in(headers)) and (sent := _keys_in_cookie(headers)):
            _check_form(scope)
        if not sent:
            raise Refused(401, NO_KEY, {"WWW-Authenticate": "Bearer"})
        client = self._keys.client_of(sent[0]) if len(sent) == 1 else None
        if client is None:
            raise Refused(401, WRONG_KEY, {"WWW-Authenticate": 'Bearer error="invalid_token"'})
        structlog.contextvars.bind_contextvars(client=client)
        return client


class Refused(Exception):
    """A refused request: the status, the detail, and the headers of its response."""


class KeyWatch:
    """Middleware that ends the open event streams of a key after it was removed.

    Other requests end soon, but a stream could go on for days. To its route, it looks as if the
    client had disconnected.
    """

    def __init__(self, app: ASGIApp, keys: ApiKeys) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request (ASGI)."""
        if scope["type"] == "http" and (client := scope["state"]["client"]):
            headers = scope["headers"]
            (key,) = _keys_in(headers) or _keys_in_cookie(headers)
            receive = self._until_removed(receive, key, client)
        await self._app(scope, receive, send)

    def _until_removed(self, receive: Receive, key: bytes, client: str) -> Receive:
        async def receive_or_end() -> Message:
            while True:
                try:
                    async with asyncio.timeout(KEY_CHECKED_SECONDS):
                        return await receive()
                except TimeoutError:
                    if self._keys.client_of(key) != client:
                        return {"type": "http.disconnect"}

        return receive_or_end


def _keys_in(headers: Headers) -> list[bytes]:
    """Return the API keys in the headers of a request. A malformed Authorization gives b""."""
    keys = []
    for name, value in headers:
        if name == b"x-api-key":
            keys.append(value)
        elif name == b"authorization":
            match = _BEARER.fullmatch(value)
            keys.append(match[1] if match else b"")
    return keys


def _keys_in_cookie(headers: Headers) -> list[bytes]:
    key = key_in_cookie(headers)
    return [] if key is None else [key]


def _check_form(scope: Scope) -> None:
    """Raise Refused if the request changes something, and no page of this service sent it.

    A browser names the sender in Sec-Fetch-Site. It leaves the header out if it is old, or if the
    service is reached by http and not on loopback. Then the Origin must be this service itself.
    """
    if scope["method"] in _SAFE_METHODS:
        return
    found = dict(scope["headers"])
    site = found.get(b"sec-fetch-site")
    if site is None:
        host = found.get(b"origin", b"").partition(b"://")[2]
        is_own = bool(host) and host.lower() == found.get(b"host", b"").lower()
    else:
        is_own = site == b"same-origin"
    if not is_own:
        raise Refused(403, FORM_OF_ANOTHER_PAGE, {})


def _is_cross_site(headers: Headers, allowed_origins: Collection[bytes]) -> bool:
    """Whether a web page of another site sent this request, and its origin is not allowed."""
    found = dict(headers)
    origin = found.get(b"origin")
    return _names_another_site(
        found.get(b"host", b""), None if origin in allowed_origins else origin
    )


@lru_cache(maxsize=256)  # most requests name the same host
def _names_another_site(host: bytes, origin: bytes | None) -> bool:
    """Whether these headers, Host and Origin, come from a web page of another site.

    There are two ways to notice it:

    1. The browser sends the page's site as Origin, and this differs from the Host. For example,
       `https://evil.example` sends a request to `127.0.0.1:8000`.
    2. The Host is a public domain. In a DNS rebinding attack, the attacker lets `evil.example`
       resolve to 127.0.0.1, so that the page and the service seem to be the same site. IP
       addresses, names without a dot and private domains cannot be used for that.
    """
    here = host.decode("latin-1").lower()
    if origin is not None and origin.decode("latin-1").lower().rpartition("/")[2] != here:
        return True
    name = here.rpartition(":")[0] if re.search(r":\d*$", here) else here
    if "." not in name or name.rstrip(".").rpartition(".")[2] in _PRIVATE_DOMAINS:
        return False
    try:
        ip_address(name.strip("[]"))
    except ValueError:
        return True
    return False


@lru_cache(maxsize=1024)
def _network(address: str) -> str:
    """Return the network that counts as one client: an IPv4 address, or a /64 network of IPv6.

    A single IPv6 client usually has a whole /64 network, and could take a new address for each
    request.
    """
    try:
        parsed = ip_address(address)
    except ValueError:  # the client of a Unix socket has no address
        return address
    # A socket for IPv4 and IPv6 shows the IPv4 address 192.0.2.1 as ::ffff:192.0.2.1.
    if isinstance(parsed, IPv6Address) and parsed.ipv4_mapped is None:
        return str(IPv6Network((int(parsed), 64), strict=False))
    return address


def _address(scope: Scope) -> str:
    return scope["client"][0] if scope.get("client") else ""
