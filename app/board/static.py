"""GET /board/static/…: the style sheet, the script and the icon of the pages."""

from fastapi import APIRouter, Request, Response

from app.api.downloads import has_current
from app.api.paths import route_path
from app.api.route import ServiceRoute, without_turn
from app.api.static_files import STATIC_PATHS, static_file

_YEAR = "public, max-age=31536000, immutable"

router = APIRouter(include_in_schema=False, route_class=ServiceRoute)


@without_turn
async def read_static_file(request: Request) -> Response:
    """Return a file. A browser keeps it for a year if it asked for the present version.

    Any other version gets the present file too, and asks again next time. So a page of a process
    that is being replaced looks right, and no cache keeps a wrong file.
    """
    file = static_file(STATIC_PATHS[route_path(request.scope)])
    is_current = request.query_params.get("v") == file.version
    etag = f'"{file.version}"'
    headers = {
        "Cache-Control": _YEAR if is_current else "no-cache",
        "ETag": etag,
        "X-Content-Type-Options": "nosniff",
    }
    if has_current(request, etag):
        return Response(status_code=304, headers=headers)
    return Response(file.content, media_type=file.media_type, headers=headers)


for path in STATIC_PATHS:
    router.get(path)(read_static_file)
