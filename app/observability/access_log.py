"""The access log: one line for each request, with its status, size and duration."""

import logging
import time

import structlog
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.observability.paths import path_of_route

_PROBES = ("/livez", "/readyz")  # health checks ask for them every few seconds
_MOST_PATH_LENGTH = 1000  # characters; a client may send 64 KiB

log = structlog.get_logger(__name__)


class AccessLog:
    """Middleware that logs each request once its response is complete, or the client disconnects.

    `bytes` is the size of the response body. `status` is null if there was no response. The line
    leaves out the query, because queries may contain secrets. It has the id and the client of the
    request, like every log line of a request. `root_path` is ROOT_PATH.
    """

    def __init__(self, app: ASGIApp, root_path: str = "") -> None:
        self._app = app
        self._root_path = root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection (ASGI)."""
        level = _log_level(scope, self._root_path)
        if level is None or not logging.root.isEnabledFor(level):
            await self._app(scope, receive, send)
            return
        began, status, size, complete = time.perf_counter(), None, 0, False

        def write() -> None:
            log.log(
                level,
                "request",
                method=scope["method"],
                path=scope["path"][:_MOST_PATH_LENGTH],
                status=status,
                seconds=round(time.perf_counter() - began, 4),
                bytes=0 if scope["method"] == "HEAD" else size,
                address=scope["client"][0] if scope["client"] else None,
            )

        async def send_and_record(message: Message) -> None:
            nonlocal status, size, complete
            await send(message)
            if message["type"] == "http.response.start":
                status = message["status"]
            elif message["type"] == "http.response.body":
                size += len(message.get("body", b""))
                if not message.get("more_body"):  # do not wait for the background tasks
                    complete = True
                    write()

        try:
            await self._app(scope, receive, send_and_record)
        finally:
            if not complete:
                write()


def silence_the_server() -> None:
    """Silence the access log of uvicorn itself, which is on with `uvicorn app.main:app`.

    Its lines have the query. With ours they would also be a second line for each request.
    """
    logging.getLogger("uvicorn.access").disabled = True


def _log_level(scope: Scope, root_path: str) -> int | None:
    """Return the log level for a request; None for the lifespan, which is not a request."""
    if scope["type"] != "http":
        return None
    return logging.DEBUG if path_of_route(scope, root_path) in _PROBES else logging.INFO
