"""HTML pages from app/templates/pages. A page loads nothing from other servers."""

import shlex
from functools import cache
from typing import Any

from fastapi import Request
from fastapi.responses import HTMLResponse
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from app.api.page_texts import duration, made_at, number, size, when
from app.api.paths import route_path
from app.api.static_files import static_url

# The script and the style sheet are files of this service. No page has a script or a style in its
# HTML, so text that slips through unescaped could not run.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; form-action 'self'; frame-src 'self'; base-uri 'none'; "
    "frame-ancestors 'none'"
)


def page(
    request: Request, template: str, *, status: int = 200, policy: str = POLICY, **values: Any
) -> HTMLResponse:
    """Render a template as the response to a request; every value is escaped.

    `policy` is the Content-Security-Policy of the page. Besides `values`, the template gets
    `prefix`, the prefix of a proxy, which it writes before each path of this service; `path`, the
    path of this page; `client`, the owner of the API key; `has_keys` and `catcher`, whether the
    service has API keys and the embedded mail catcher.
    """
    return HTMLResponse(
        render(template, **_frame(request), **values),
        status,
        headers={
            "Content-Security-Policy": policy,
            "X-Content-Type-Options": "nosniff",
            # Nobody sees the page after a sign-out, and "back" shows the present state.
            "Cache-Control": "no-store",
            # With no-referrer, browsers would send `Origin: null` with our own forms.
            "Referrer-Policy": "same-origin",
        },
    )


def render(template: str, **values: Any) -> Markup:
    """Render a template, or a part of a page; every value is escaped.

    Another template can show the result as it is, because it is known to be escaped.
    """
    return escape(_environment().get_template(template).make_module(values))


def _frame(request: Request) -> dict[str, Any]:
    """Return the values that the frame of every page, base.html, needs."""
    state = request.scope.get("state", {})
    settings = state.get("settings")  # missing if the app runs without its lifespan
    return {
        "prefix": request.scope.get("root_path", ""),
        "path": route_path(request.scope),
        "client": state.get("client", ""),
        "has_keys": settings is not None and not settings.is_open,
        "catcher": settings is not None and settings.catcher,
    }


def example(request: Request) -> str:
    """Return a curl command that sends a mail through the service at the URL of this request."""
    url = f"{request.base_url}send-notification/ada@example.com"
    return f"curl -i -X POST {shlex.quote(url)}"


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("app", "templates/pages"),
        autoescape=True,
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters = (when, made_at, number, size, duration)
    environment.filters.update({function.__name__: function for function in filters})
    environment.globals.update(static_url=static_url)
    return environment
