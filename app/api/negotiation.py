"""Two forms of one resource at one path: JSON for programs, and a page for browsers.

A client gets the page if its Accept header prefers `text/html` to `application/json` (RFC 9110,
section 12.5.1), as browsers do. All others get JSON: clients that do not care, such as curl with
its `*/*`, and clients without the header.
"""

import re
from functools import lru_cache
from typing import Any

from fastapi import Depends, Request
from starlette.routing import Match
from starlette.types import Scope

from app.api.route import ServiceRoute

_QUALITY = re.compile(r"q=(0(?:\.\d{0,3})?|1(?:\.0{0,3})?)")  # RFC 9110, section 12.4.2


def prefers_page(scope: Scope) -> bool:
    """Whether the client prefers a page to JSON."""
    values = (value for name, value in scope["headers"] if name == b"accept")
    return _prefers_html(b",".join(values).decode("latin-1").lower())


class DataRoute(ServiceRoute):
    """A JSON route. It declines requests that prefer HTML.

    The page's route at the same path answers them. It comes later in the app.
    """

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        """Compare the request with this route (Starlette)."""
        match, child_scope = super().matches(scope)
        if match is not Match.NONE and prefers_page(scope):
            return Match.NONE, {}
        return match, child_scope


async def _vary_by_accept(request: Request) -> None:
    request.state.response_headers.append((b"vary", b"Accept"))


VARY_BY_ACCEPT: Any = Depends(_vary_by_accept)
"""A dependency of both routes: no cache gives the page to a program, or JSON to a browser."""


@lru_cache(maxsize=64)  # there are few browsers, and few other clients
def _prefers_html(accept: str) -> bool:
    """Compare the qualities of both types in an Accept header.

    For example, "text/html,*/*;q=0.8" has 1 for HTML and 0.8 for JSON. "*/*" has 1 for both.
    """
    qualities = dict(map(_parse_range, accept.split(",")))
    return _quality(qualities, "text/html") > _quality(qualities, "application/json")


def _parse_range(text: str) -> tuple[str, float]:
    """Return a media range and its quality: ("text/*", 0.5) for "text/*;q=0.5"."""
    media_range, *parameters = (part.strip() for part in text.split(";"))
    matches = (_QUALITY.fullmatch(parameter) for parameter in parameters)
    return media_range, next((float(match[1]) for match in matches if match), 1.0)


def _quality(qualities: dict[str, float], media_type: str) -> float:
    """Return the quality of a type by the most specific range, and 0 if no range matches it."""
    ranges = (media_type, f"{media_type.partition('/')[0]}/*", "*/*")
    return next((qualities[name] for name in ranges if name in qualities), 0.0)
