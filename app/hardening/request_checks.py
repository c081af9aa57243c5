"""Refuse requests by their heads, and bound their bodies.

`RequestChecks` asks a list of checks about the head of each request. `check_framing` is one of
them, `app.hardening.access` has the other. `BodyLimit` bounds the body.
"""

import re
from collections.abc import Callable, Mapping, Sequence

from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api.errors import problem
from app.api.paths import route_path

# RFC 9112, section 3.2: a name, an IPv4 address or an IPv6 address, and optionally a port.
_HOST = re.compile(rb"(?:[A-Za-z0-9._~%!$&'()*+,;=-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{0,5})?")

BAD_HOST = "An HTTP/1.1 request must have exactly one Host header with a valid host name."
BAD_FRAMING = "A request body must have either a Content-Length or Transfer-Encoding: chunked."
TOO_LARGE = "The request body is larger than this service accepts."

Check = Callable[[Scope], Response | None]
"""Inspects the head of a request. Returns the response if the request is refused, or else None."""


class RequestChecks:
    """Middleware that answers a request with the first refusal of its checks.

    If no check refuses the request, the app answers it.
    """

    def __init__(self, app: ASGIApp, checks: Sequence[Check]) -> None:
        self._app = app
        self._checks = checks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request (ASGI)."""
        app = self._app
        if scope["type"] == "http":
            app = self._refusal(scope) or app  # a response is an ASGI app, too
        await app(scope, receive, send)

    def _refusal(self, scope: Scope) -> Response | None:
        for check in self._checks:
            if refusal := check(scope):
                return refusal
        return None


def check_framing(scope: Scope) -> Response | None:
    """Refuse a request that a proxy in front may read differently (RFC 9112, 3.2 and 6.3).

    If the two disagree about the host or about the end of the body, an attacker can smuggle a
    second request past the proxy. Bytes that are not HTTP at all never get here, because the
    server's parser refuses them.
    """
    if complaint := _framing_error(scope):
        # The end of this request is uncertain, so the connection is closed after the answer.
        return problem(scope["path"], 400, complaint, headers={"Connection": "close"})
    return None


def _framing_error(scope: Scope) -> str | None:
    hosts, content_lengths, transfer_encodings = [], 0, []
    for name, value in scope["headers"]:
        if name == b"host":
            hosts.append(value)
        elif name == b"content-length":
            content_lengths += 1
        elif name == b"transfer-encoding":
            transfer_encodings.append(value.lower())
    is_http_1_0 = scope["http_version"] == "1.0"
    if len(hosts) > 1 or not all(map(_HOST.fullmatch, hosts)):
        return BAD_HOST
    if not hosts and not is_http_1_0:
        return BAD_HOST
    if transfer_encodings and (
        transfer_encodings != [b"chunked"] or content_lengths or is_http_1_0
    ):
        return BAD_FRAMING
    return None


class BodyLimit:
    """Middleware that refuses a request body of more than `limit` bytes with 413.

    `limits` has the limits of single paths. A Content-Length over the limit is refused before the
    body is read. Because a client may send more than it announces, the bytes are counted as well.
    FastAPI has a `max_body_size` too, but answers in plain text.
    """

    def __init__(self, app: ASGIApp, limit: int, limits: Mapping[str, int]) -> None:
        self._app = app
        self._limit = limit
        self._limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request (ASGI)."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        limit = self._limits.get(route_path(scope), self._limit)
        if _content_length(scope) > limit:
            await problem(scope["path"], 413, TOO_LARGE)(scope, receive, send)
        else:
            await self._app(scope, _limited(receive, limit), send)


def _content_length(scope: Scope) -> int:
    """Return the announced length of the body, 0 without one.

    The server has checked that the value consists of digits. Only the first 20 are read, because
    Python refuses to parse very long numbers. A longer number is over every limit, or it begins
    with many zeros; then counting the bytes bounds the body.
    """
    for name, value in scope["headers"]:
        if name == b"content-length":
            return int(value[:20] or 0)
    return 0


def _limited(receive: Receive, limit: int) -> Receive:
    """Wrap `receive`: it raises HTTPException 413 once the body has more than `limit` bytes."""
    received = 0

    async def receive_within_limit() -> Message:
        nonlocal received
        message = await receive()
        received += len(message.get("body", b""))
        if received > limit:
            raise HTTPException(413, TOO_LARGE)
        return message

    return receive_within_limit
