"""One log line for each request: what was asked, what was answered, and how long it took."""

import logging
import time

import structlog
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_PROBES = ("/livez", "/readyz")  # asked every few seconds by what watches the service
_LONGEST_PATH = 1000  # characters; a client may send 64 KiB

log = structlog.get_logger(__name__)


class AccessLog:
    """Logs each request when its answer is complete, or when the client has gone before that.

    The query is left out, because people put secrets there. `bytes` are those of the answer's body;
    `status` is null where there was no answer. The request's id and its client, which are bound on
    the way in, stand on the line as on every other one.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        # Under `uvicorn app.main:app` each request would have a second line.
        logging.getLogger("uvicorn.access").disabled = True

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection (ASGI)."""
        level = _level(scope)
        if level is None or not logging.root.isEnabledFor(level):
            await self._app(scope, receive, send)
            return
        began, status, size, complete = time.perf_counter(), None, 0, False

        def write() -> None:
            log.log(
                level,
                "request",
                method=scope["method"],
                path=scope["path"][:_LONGEST_PATH],
                status=status,
                seconds=round(time.perf_counter() - began, 4),
                bytes=0 if scope["method"] == "HEAD" else size,
                address=scope["client"][0] if scope["client"] else None,
            )

        async def send_and_note(message: Message) -> None:
            nonlocal status, size, complete
            await send(message)
            if message["type"] == "http.response.start":
                status = message["status"]
            elif message["type"] == "http.response.body":
                size += len(message.get("body", b""))
                if not message.get("more_body"):  # background tasks follow, and take their time
                    complete = True
                    write()

        try:
            await self._app(scope, receive, send_and_note)
        finally:
            if not complete:
                write()


def _level(scope: Scope) -> int | None:
    """Give the level of a request's line; None for what is no request."""
    if scope["type"] != "http":
        return None
    path = scope["path"].removeprefix(scope.get("root_path", ""))
    return logging.DEBUG if path in _PROBES else logging.INFO
