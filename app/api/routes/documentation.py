"""The documentation: /openapi.json, Swagger UI and Redoc. All files come from this server.

FastAPI's own pages load their scripts from a content delivery network, so without the internet they
stay blank. The package `fastapi-standalone-docs` contains the same scripts as files.
"""

import json
from functools import lru_cache
from pathlib import Path

import fastapi_standalone_docs
from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.responses import FileResponse, HTMLResponse

from app.api.pages import page
from app.api.paths import route_path

_OWN_FILES = Path(__file__).parents[2] / "templates" / "pages"
_PACKAGE = Path(fastapi_standalone_docs.__file__).parent
_SCRIPT, _DAY = "text/javascript", "public, max-age=86400"

_FILES: dict[str, tuple[Path, str]] = {
    "/docs/start.js": (_OWN_FILES / "start.js", _SCRIPT),
    "/docs/swagger-ui-bundle.js": (_PACKAGE / "static/swagger/swagger-ui-bundle.js", _SCRIPT),
    "/docs/swagger-ui.css": (_PACKAGE / "static/swagger/swagger-ui.css", "text/css"),
    "/docs/favicon.png": (_PACKAGE / "static/fastapi/favicon.png", "image/png"),
    "/redoc/redoc.standalone.js": (_PACKAGE / "static/redoc/redoc.standalone.js", _SCRIPT),
    "/redoc/logo-mini.svg": (_PACKAGE / "static/redoc/logo-mini.svg", "image/svg+xml"),
}
PATHS = frozenset(("/docs", "/redoc", "/openapi.json", *_FILES))

_SWAGGER_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
# Redoc creates its styles at run time, and its search runs in a worker that it creates from a blob.
_REDOC_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'unsafe-inline'; img-src 'self' data:; "
    "connect-src 'self'; worker-src blob:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)

router = APIRouter(include_in_schema=False)


@router.get("/openapi.json")
async def read_document(request: Request) -> Response:
    """Return the OpenAPI document.

    It is made once, because clients without a key may ask for it as often as they like.
    """
    return Response(
        _document(request.app, request.scope.get("root_path", "")), media_type="application/json"
    )


@lru_cache(maxsize=4)
def _document(app: FastAPI, prefix: str) -> bytes:
    document = app.openapi()
    if prefix:
        document = {**document, "servers": [{"url": prefix}]}
    return json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"


@router.get("/docs")
async def read_swagger_ui(request: Request) -> HTMLResponse:
    """Return Swagger UI, in which a person can try out every route."""
    return page(request, "docs.html", policy=_SWAGGER_POLICY)


@router.get("/redoc")
async def read_redoc(request: Request) -> HTMLResponse:
    """Return Redoc, which shows every route on one page."""
    return page(request, "redoc.html", policy=_REDOC_POLICY)


async def read_file(request: Request) -> FileResponse:
    """Return a script, a style sheet or a picture of these pages."""
    file, media_type = _FILES[route_path(request.scope)]
    headers = {"Cache-Control": _DAY, "X-Content-Type-Options": "nosniff"}
    return FileResponse(file, media_type=media_type, headers=headers)


for path in _FILES:
    router.get(path)(read_file)
