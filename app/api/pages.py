"""HTML pages from app/templates/pages. A page loads nothing from other servers."""

import shlex
from functools import cache
from typing import Any

from fastapi import Request
from fastapi.responses import HTMLResponse
from jinja2 import Environment, PackageLoader, StrictUndefined

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; frame-src 'self'; base-uri 'none'"


def page(request: Request, template: str, *, policy: str = _POLICY, **values: Any) -> HTMLResponse:
    """Render a template as the response to a request; every value is escaped.

    `policy` is the Content-Security-Policy of the page. The template also gets `prefix`, the prefix
    of a proxy, which it writes before each path of this service.
    """
    prefix = request.scope.get("root_path", "")
    return HTMLResponse(
        _environment().get_template(template).render(values, prefix=prefix),
        headers={"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff"},
    )


def example(request: Request) -> str:
    """Return a curl command that sends a mail through the service at the URL of this request."""
    url = f"{request.base_url}send-notification/ada@example.com"
    return f"curl -i -X POST {shlex.quote(url)}"


@cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("app", "templates/pages"),
        autoescape=True,
        undefined=StrictUndefined,
        keep_trailing_newline=True,
    )
