"""Around every request: its id, its prefix, the checks of its head, and always an answer."""

import asyncio
import random
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence

import structlog
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from afterward.errors import CannotStart
from app.api.errors import problem
from app.api.json_body import TOO_LARGE
from app.api.paths import route_path, with_prefix

# RFC 9112, section 3.2: a name, an IPv4 address or an IPv6 address, and a port perhaps.
_HOST = re.compile(rb"(?:[A-Za-z0-9._~%!$&'()*+,;=-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{0,5})?")
_SANE_ID = re.compile(rb"[A-Za-z0-9._:/+=@-]{1,128}")

NO_HOST = "An HTTP/1.1 request has one Host header, which names a host."
STOPPING = (
    "The service is stopping. Whether this request was carried out is not known: send it again, "
    "with the same Idempotency-Key."
)
BAD_FRAMING = "A body has a Content-Length or is chunked; not both, and nothing else."

log = structlog.get_logger(__name__)

Check = Callable[[Scope], Awaitable[Response | None]]
"""Looks at the head of a request, and gives the answer to one that is refused for it."""


class Envelope:
    """Gives each request its id and, whatever happens, an answer.

    The id is the client's X-Request-ID or a new one; it is echoed, and stands on every log line.
    The first of `checks` that refuses the request answers it; if none does, the app. An unexpected
    error is logged once, with its traceback, and answered with 500.

    `root_path` is the prefix under which a proxy shows the service; without one, the server's
    counts (`uvicorn --root-path`). The envelope puts it before the Location of each answer, so
    routes need not. An address in the body of an answer needs the prefix as well.

    HEAD is answered as GET is, without the body (RFC 9110, 9.3.2).
    """

    def __init__(self, app: ASGIApp, checks: Sequence[Check], root_path: str = "") -> None:
        self._app = app
        self._checks = checks
        self._root_path = root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection (ASGI)."""
        if scope["type"] != "http":
            await _start_plainly(self._app, scope, receive, send)
            return
        prefix = self._root_path or scope.get("root_path", "").rstrip("/")
        if prefix:
            scope = with_prefix(scope, prefix)
            send = _with_prefixed_location(send, prefix)
        if scope["method"] == "HEAD":
            scope = {**scope, "method": "GET"}
            receive, send = _head_only(send)
        given = _header(scope, b"x-request-id")
        request_id = given if _SANE_ID.fullmatch(given) else b"%032x" % random.getrandbits(128)
        headers = [(b"x-request-id", request_id)]
        scope.setdefault("state", {}).update(request_id=request_id.decode(), answer_headers=headers)
        structlog.contextvars.bind_contextvars(request_id=request_id.decode())
        started = False

        async def send_with_headers(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                message["headers"] = [*message.get("headers", ()), *headers]
            await send(message)

        try:
            answer = await self._refusal(scope) or self._app
            await answer(scope, receive, send_with_headers)
        except ClientDisconnect:
            log.info("client went away", method=scope["method"], path=scope["path"])
        except (Exception, asyncio.CancelledError) as error:
            failure = _failure(scope, error)
            if started:
                raise  # too late for an answer: the connection must break off
            await failure(scope, receive, send_with_headers)

    async def _refusal(self, scope: Scope) -> Response | None:
        for check in self._checks:
            if refusal := await check(scope):
                return refusal
        return None


def _failure(scope: Scope, error: BaseException) -> Response:
    """Log an error that ended a request, and give the answer to that request."""
    if isinstance(error, asyncio.CancelledError):  # by the server, which stops and waits no longer
        log.warning("request cut off", method=scope["method"], path=scope["path"])
        return problem(scope["path"], 503, STOPPING)
    log.error("request failed", method=scope["method"], path=scope["path"], exc_info=error)
    return problem(scope["path"], 500, "Something went wrong here; it was logged.")


def _with_prefixed_location(send: Send, prefix: str) -> Send:
    """Send answers whose Location, if it is a path of the service, begins with the prefix."""
    before = prefix.encode()

    async def send_with_prefix(message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [
                (name, before + value if name == b"location" and value[:1] == b"/" else value)
                for name, value in message.get("headers", ())
            ]
        await send(message)

    return send_with_prefix


def _head_only(send: Send) -> tuple[Receive, Send]:
    """Receive no body, and send the head of an answer without its body.

    Once the head is sent, `receive` tells that the client has gone. So an answer that streams stops
    there: a download reads no further, and an event stream ends.
    """
    head_is_sent = asyncio.Event()
    to_receive: list[Message] = [{"type": "http.request", "body": b"", "more_body": False}]

    async def receive_nothing() -> Message:
        if to_receive:
            return to_receive.pop()
        await head_is_sent.wait()
        return {"type": "http.disconnect"}

    async def send_head(message: Message) -> None:
        if message["type"] == "http.response.start":
            await send(message)
            await send({"type": "http.response.body", "body": b"", "more_body": False})
            head_is_sent.set()

    return receive_nothing, send_head


async def check_soundness(scope: Scope) -> Response | None:
    """Refuse what a proxy in front may have understood otherwise (RFC 9112, 3.2 and 6.3).

    The server's parser has refused what is no HTTP at all.
    """
    if complaint := _complaint(scope):
        # What follows the head may be anything: nothing more is read from this client.
        return problem(scope["path"], 400, complaint, headers={"Connection": "close"})
    return None


def _complaint(scope: Scope) -> str | None:
    hosts, lengths, encodings = [], 0, []
    for name, value in scope["headers"]:
        if name == b"host":
            hosts.append(value)
        elif name == b"content-length":
            lengths += 1
        elif name == b"transfer-encoding":
            encodings.append(value.lower())
    if len(hosts) > 1 or not all(map(_HOST.fullmatch, hosts)):
        return NO_HOST
    modern = scope["http_version"] != "1.0"
    if modern and not hosts:
        return NO_HOST
    if encodings and (encodings != [b"chunked"] or lengths or not modern):
        return BAD_FRAMING
    return None


class BodyLimit:
    """A check that refuses bodies over a limit with 413; `limits` are those of single paths.

    Whoever reads the body goes by the same limit, whether or not Content-Length tells the truth.
    FastAPI's own max_body_size answers in plain text.
    """

    def __init__(self, limit: int, limits: Mapping[str, int]) -> None:
        self._limit = limit
        self._limits = limits

    async def __call__(self, scope: Scope) -> Response | None:
        """Note the limit for this request, and compare what it announces."""
        limit = self._limits.get(route_path(scope), self._limit)
        scope["state"]["body_limit"] = limit
        # The server has checked that it is a number; a longer one than this is too large anyway.
        if int(_header(scope, b"content-length")[:20] or 0) > limit:
            return problem(scope["path"], 413, TOO_LARGE)
        return None


def _header(scope: Scope, name: bytes) -> bytes:
    """The value of a request header; empty if it is not there."""
    for key, value in scope["headers"]:
        if key == name:
            return value  # type: ignore[no-any-return]
    return b""


async def _start_plainly(app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    """Tell the server in one line why a start failed, where Starlette would send a traceback."""
    failure: Message | None = None

    async def hold_failure(message: Message) -> None:
        nonlocal failure
        if message["type"] == "lifespan.startup.failed":
            failure = message
        else:
            await send(message)

    try:
        await app(scope, receive, hold_failure)
    except BaseException as error:
        if failure is not None:
            known = isinstance(error, CannotStart)
            await send({**failure, "message": str(error)} if known else failure)
        raise
