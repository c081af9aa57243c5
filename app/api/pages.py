"""The few HTML pages: rendered from app/templates/pages, with nothing loaded from elsewhere."""

import shlex
from functools import cache
from typing import Any

from fastapi import Request
from fastapi.responses import HTMLResponse
from jinja2 import Environment, PackageLoader, StrictUndefined

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; frame-src 'self'; base-uri 'none'"


def page(request: Request, template: str, *, policy: str = _POLICY, **values: Any) -> HTMLResponse:
    """Render a page as the answer to a request; every value is escaped.

    `policy` is its Content-Security-Policy. In the template, `prefix` stands before each path of
    this service, since a proxy may show it under one.
    """
    prefix = request.scope.get("root_path", "")
    return HTMLResponse(
        _environment().get_template(template).render(values, prefix=prefix),
        headers={"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff"},
    )


def example(request: Request) -> str:
    """Write the command that sends a mail through the service as the browser reached it."""
    at = f"{request.base_url}send-notification/ada@example.com"
    return f"curl -i -X POST {shlex.quote(at)}"


@cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("app", "templates/pages"),
        autoescape=True,
        undefined=StrictUndefined,
        keep_trailing_newline=True,
    )
