"""GET /: the overview."""

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse

from app.api.pages import example, page
from app.api.route import ServiceRoute

router = APIRouter(include_in_schema=False, route_class=ServiceRoute)


@router.get("/")
async def read_overview(request: Request) -> HTMLResponse:
    """Show how the service is doing."""
    return page(request, "board/overview.html", example=example(request))
