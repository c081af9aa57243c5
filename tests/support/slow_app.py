"""A slow app behind the project's server. A deadline for slow clients must not cut it off.

`POST /work?SECONDS` sleeps for SECONDS, reads the whole body, and answers with its size in bytes.
"""

import asyncio

from starlette.types import Receive, Scope, Send

from app.hardening.deadlines import protocol_with_deadlines
from app.observability.logs import configure_logging
from app.server import serve
from app.settings import load_settings


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    """Serve one request (ASGI)."""
    if scope["type"] != "http":
        return
    await asyncio.sleep(float(scope["query_string"] or 0))
    size, more = 0, True
    while more:
        message = await receive()
        size += len(message.get("body", b""))
        more = message.get("more_body", False)
    await send({"type": "http.response.start", "status": 200})
    await send({"type": "http.response.body", "body": str(size).encode()})


if __name__ == "__main__":
    settings = load_settings()
    configure_logging(settings.log_level, settings.log_format)
    serve(app, settings, protocol_with_deadlines(settings))
