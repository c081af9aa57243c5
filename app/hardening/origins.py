"""CORS: web pages of listed origins may use the API."""

from collections.abc import Collection

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp

from app.api.errors import problem

_METHODS = ("GET", "HEAD", "POST", "DELETE")
_REQUEST_HEADERS = (
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
_RESPONSE_HEADERS = (
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
    """Middleware that lets scripts on web pages of `origins` call the API and read its responses.

    A browser first sends a preflight request, which cannot carry an API key. So this middleware
    must be outside the check of keys. Responses to other origins have no CORS headers, so browsers
    hide them from the page. A script of a listed origin sends its key in a header, as every program
    does: the cookie of the dashboard never goes to another site.
    """

    def __init__(self, app: ASGIApp, origins: Collection[str]) -> None:
        super().__init__(
            app,
            allow_origins=origins,
            allow_methods=_METHODS,
            allow_headers=_REQUEST_HEADERS,
            expose_headers=_RESPONSE_HEADERS,
            # The browser asks in the same preflight request whether a page from the internet may
            # call a service in a private network.
            allow_private_network=True,
        )

    def preflight_response(self, request_headers: Headers) -> Response:
        """Answer a preflight request: 204, or 400 with a problem that names the refused part."""
        response = super().preflight_response(request_headers)
        headers = {
            name: value
            for name, value in response.headers.items()
            if name not in {"content-length", "content-type"}
        }
        if response.status_code >= 400:  # noqa: PLR2004
            reason = bytes(response.body).decode().removeprefix("Disallowed CORS ")
            return problem(
                "", 400, f"The CORS preflight is refused because of its {reason}.", headers=headers
            )
        return Response(status_code=204, headers=headers)
