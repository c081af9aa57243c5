"""The service with a fault at some of its routes, of a different kind at each.

It is the negative control of test_schemathesis.py, which must find all these faults.
"""

from collections.abc import Mapping

import uvicorn
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from app.api.errors import problem
from app.main import create_app
from app.settings import load_settings

KEYS = {"ada": "key-of-ada", "eve": "key-of-eve"}
AUTHORIZATION = {name: f"Bearer {key}".encode() for name, key in KEYS.items()}

ANSWERS: Mapping[tuple[str, str], ASGIApp] = {
    ("GET", "/readyz"): PlainTextResponse("It broke.", 500),
    ("PUT", "/livez"): PlainTextResponse("It lives now."),
    ("GET", "/metrics"): PlainTextResponse("I am a teapot.", 418),
    ("GET", "/inbox"): PlainTextResponse("Come in, whoever you are."),
    ("GET", "/events"): PlainTextResponse("data: x\n\n", media_type="text/event-stream"),
    ("GET", "/tasks"): problem("/tasks", 401, "How to show a key is a secret."),
    ("GET", "/uploads"): JSONResponse({"data": "none", "has_more": "perhaps"}),
    ("POST", "/process/"): JSONResponse({"message": "It is taken, whatever it is."}, 202),
    ("POST", "/test-task/"): problem("/test-task/", 422, "It is refused, whatever it is."),
}
"""The faulty response of each of these routes."""


class FaultyService:
    """Answers some requests of clients with a key wrongly, and passes the rest on (ASGI).

    A route has at most two kinds of faults, because Schemathesis stops at the first that it finds.
    """

    def __init__(self, service: ASGIApp) -> None:
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request, with a fault if its route has one."""
        serve = self._service
        if scope["type"] == "http":
            method, path = scope["method"], scope["path"]
            shown = dict(scope["headers"]).get(b"authorization")
            if shown in AUTHORIZATION.values() or path == "/inbox":
                serve = ANSWERS.get((method, path), serve)
                if method == "DELETE" and path.rpartition("/")[0] == "/uploads":
                    serve = Response(status_code=204)  # without deleting the upload
                elif method == "GET" and path.startswith("/tasks/"):
                    scope["headers"] = [(b"host", b"x"), (b"authorization", AUTHORIZATION["ada"])]
        await serve(scope, receive, send)


if __name__ == "__main__":
    settings = load_settings()
    uvicorn.run(
        FaultyService(create_app(settings)), port=settings.port, log_config=None, access_log=False
    )
