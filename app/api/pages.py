"""The few HTML pages: rendered from app/templates/pages, with nothing loaded from elsewhere."""

from functools import cache
from typing import Any

from fastapi.responses import HTMLResponse
from jinja2 import Environment, PackageLoader, StrictUndefined

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; frame-src 'self'; base-uri 'none'"


def page(template: str, **values: Any) -> HTMLResponse:
    """Render a page; every value is escaped."""
    return HTMLResponse(
        _environment().get_template(template).render(values),
        headers={"Content-Security-Policy": _POLICY, "X-Content-Type-Options": "nosniff"},
    )


@cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("app", "templates/pages"), autoescape=True, undefined=StrictUndefined
    )
