"""Turns JSON errors into HTML error pages for browsers.

Every refusal and error of the service is a problem (see app.api.errors), whether a route, the
access control or a size limit has made it. So this is the one place that turns them into pages.
Clients that do not ask for HTML get the problem as JSON.
"""

import json
from typing import Any
from urllib.parse import urlencode

from fastapi import Request
from starlette.responses import RedirectResponse, Response
from starlette.types import Message, Scope, Send

from app.api.negotiation import prefers_page
from app.api.pages import page
from app.api.paths import is_page, route_path

SIGN_IN = "/board/sign-in"
_FIRST_ERROR = 400
_UNAUTHORIZED = 401
# Headers that describe the body of the problem, or the way to authenticate without a browser.
_NOT_OF_THE_PAGE = {b"content-type", b"content-length", b"www-authenticate"}


def with_error_pages(scope: Scope, send: Send) -> Send:
    """Wrap `send`: a problem in response to a browser's request for a page becomes a page.

    Instead of 401, the browser is sent to the page to sign in.
    """
    if not is_page(route_path(scope)) or not prefers_page(scope):
        return send
    problem_head: Message | None = None
    body = b""

    async def send_page(message: Message) -> None:
        nonlocal problem_head, body
        if message["type"] == "http.response.start" and _is_problem(message):
            problem_head = message
            return
        if problem_head is None:
            await send(message)
            return
        body += message.get("body", b"")
        if not message.get("more_body"):
            response = _response_to(scope, problem_head, json.loads(body))
            await response(scope, _receive_nothing, send)

    return send_page


def _is_problem(head: Message) -> bool:
    """Whether a response is an error. An attachment of a mail can have the same media type."""
    is_error = head["status"] >= _FIRST_ERROR
    return is_error and (b"content-type", b"application/problem+json") in head["headers"]


async def _receive_nothing() -> Message:
    return {"type": "http.disconnect"}


def _response_to(scope: Scope, head: Message, problem: dict[str, Any]) -> Response:
    """Return the response in place of a problem. It keeps headers such as Retry-After."""
    response = (
        _redirect_to_sign_in(scope)
        if head["status"] == _UNAUTHORIZED
        else page(
            Request(scope),
            "error.html",
            status=head["status"],
            problem=problem,
            request_id=scope.get("state", {}).get("request_id"),
        )
    )
    response.raw_headers += [
        header for header in head["headers"] if header[0] not in _NOT_OF_THE_PAGE
    ]
    return response


def _redirect_to_sign_in(scope: Scope) -> Response:
    """Return a redirect that brings the browser back to this page after it has signed in."""
    address = route_path(scope)
    if query := scope["query_string"].decode("latin-1"):
        address += f"?{query}"
    came_for = f"?{urlencode({'next': address})}" if scope["method"] == "GET" else ""
    return RedirectResponse(SIGN_IN + came_for, 303)
