"""Middleware around every request: its id, the prefix of a proxy, HEAD, and unexpected errors."""

import asyncio
import random
import re
import time

import structlog
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from afterward.errors import CannotStart
from app.api.error_pages import with_error_pages
from app.api.errors import problem
from app.api.paths import with_prefix

_VALID_ID = re.compile(rb"[A-Za-z0-9._:/+=@-]{1,128}")

STOPPING = (
    "The service stopped before this request was finished, and it is not known whether it was "
    "carried out. Send it again with the same Idempotency-Key."
)
INTERNAL_ERROR = "An unexpected error occurred. The service has logged it."

log = structlog.get_logger(__name__)


class RequestEnvelope:
    """Middleware that prepares each request, and makes sure that each gets a response.

    1. The prefix of a proxy becomes the `root_path` of the request, and comes before the Location
       of the response, so that routes do not need to know it. It is ROOT_PATH, or else the root
       path of the server (`uvicorn --root-path`). A route that writes a URL into the body of its
       response has to add the prefix itself.
    2. HEAD is answered like GET, without the body (RFC 9110, 9.3.2).
    3. An error in response to a browser's request for a page becomes a page.
    4. The request gets an id: the client's X-Request-ID if it is valid, or else a new one. The
       response returns it, and every log line of the request has it.
    5. An unexpected error is logged with its traceback, and answered with 500.
    """

    def __init__(self, app: ASGIApp, root_path: str = "") -> None:
        self._app = app
        self._root_path = root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection (ASGI)."""
        if scope["type"] != "http":
            await _run_lifespan(self._app, scope, receive, send)
            return
        # 1. The prefix
        prefix = self._root_path or scope.get("root_path", "").rstrip("/")
        if prefix:
            scope = with_prefix(scope, prefix)
            send = _with_prefixed_location(send, prefix)
        # 2. HEAD
        if scope["method"] == "HEAD":
            scope = {**scope, "method": "GET"}
            receive, send = _head_only(send)
        # 3. The errors of pages
        send = with_error_pages(scope, send)
        # 4. The id
        request_id = _request_id(scope)
        response_headers = [(b"x-request-id", request_id.encode())]
        scope.setdefault("state", {}).update(
            request_id=request_id, client="", response_headers=response_headers
        )
        structlog.contextvars.bind_contextvars(request_id=request_id)
        started = False

        async def send_with_headers(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                message["headers"] = [*message.get("headers", ()), *response_headers]
            await send(message)

        # 5. The app, and its errors
        try:
            await self._app(scope, receive, send_with_headers)
        except ClientDisconnect:
            log.info("client went away", method=scope["method"], path=scope["path"])
        except (Exception, asyncio.CancelledError) as error:
            response = _error_response(scope, error)
            if started:
                raise  # too late for another response: the server breaks the connection off
            await response(scope, receive, send_with_headers)


def _request_id(scope: Scope) -> str:
    """Return the client's X-Request-ID if it is valid, or else a new id."""
    for name, value in scope["headers"]:
        if name == b"x-request-id":
            if _VALID_ID.fullmatch(value):
                return value.decode()  # type: ignore[no-any-return]
            break
    # It begins with the time, so that an index of ids grows at its end.
    return f"{time.time_ns() // 1_000_000:012x}{random.getrandbits(80):020x}"


def _error_response(scope: Scope, error: BaseException) -> Response:
    """Log an error that ended a request, and return the response to that request.

    The server cancels a request if it stops and the request does not end in time.
    """
    if isinstance(error, asyncio.CancelledError):
        log.warning("request cut off", method=scope["method"], path=scope["path"])
        return problem(scope["path"], 503, STOPPING)
    log.error("request failed", method=scope["method"], path=scope["path"], exc_info=error)
    return problem(scope["path"], 500, INTERNAL_ERROR)


def _with_prefixed_location(send: Send, prefix: str) -> Send:
    """Wrap `send`: a Location that is a path of the service gets the prefix."""
    prefix_bytes = prefix.encode()

    async def send_with_prefix(message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [
                (name, prefix_bytes + value)
                if name == b"location" and value.startswith(b"/")
                else (name, value)
                for name, value in message.get("headers", ())
            ]
        await send(message)

    return send_with_prefix


def _head_only(send: Send) -> tuple[Receive, Send]:
    """Return a `receive` without a body, and a `send` that sends only the head of the response.

    Once the head is sent, `receive` reports that the client has disconnected. So a streaming
    response stops: a download reads no further, and an event stream ends.
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


async def _run_lifespan(app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    """Run the app's lifespan; if the start fails, report CannotStart in one line.

    Starlette would report the traceback.
    """
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
            if isinstance(error, CannotStart):
                failure = {**failure, "message": str(error)}
            await send(failure)
        raise
