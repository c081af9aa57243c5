"""Cross-origin requests: browser applications of listed origins may use the API (CORS)."""

from collections.abc import Collection

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp

from app.api.errors import problem

_METHODS = ("GET", "HEAD", "POST", "DELETE")
_TAKEN = (
    "Authorization",
    "X-API-Key",
    "Content-Type",
    "Idempotency-Key",
    "X-Request-ID",
    "Last-Event-ID",
    "Range",
    "If-Range",
    "If-None-Match",
)
_GIVEN = (
    "Location",
    "Idempotency-Replay",
    "X-Request-ID",
    "Retry-After",
    "RateLimit",
    "RateLimit-Policy",
    "WWW-Authenticate",
    "Allow",
    "ETag",
    "Accept-Ranges",
    "Content-Range",
    "Content-Disposition",
)


class Origins(CORSMiddleware):
    """Lets the scripts of web pages from `origins` call the API, and read its answers.

    A browser asks for leave before such a call, in a preflight request, which cannot carry a key.
    So this stands around the check of keys. Answers to other origins say nothing about them, and
    then the browser keeps them from the page. No cookie is ever asked for: a page shows its key in
    a header, as every client does.
    """

    def __init__(self, app: ASGIApp, origins: Collection[str]) -> None:
        super().__init__(
            app,
            allow_origins=origins,
            allow_methods=_METHODS,
            allow_headers=_TAKEN,
            expose_headers=_GIVEN,
            # From a page on the internet to a service in this network, which the browser asks
            # about in the same preflight.
            allow_private_network=True,
        )

    def preflight_response(self, request_headers: Headers) -> Response:
        """Answer a preflight request: 204, or 400 with a problem that names what is not allowed."""
        answer = super().preflight_response(request_headers)
        headers = {
            name: value
            for name, value in answer.headers.items()
            if name not in {"content-length", "content-type"}
        }
        if answer.status_code >= 400:  # noqa: PLR2004
            reason = bytes(answer.body).decode().removeprefix("Disallowed CORS ")
            return problem("", 400, f"Not allowed across origins: {reason}.", headers=headers)
        return Response(status_code=204, headers=headers)
