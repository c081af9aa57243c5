"""GET /: the overview, which is also at /board."""

from fastapi import APIRouter, Request, Response
from fastapi.responses import HTMLResponse

from app.api.dependencies import ClientDep
from app.api.forms import see_other
from app.api.pages import example, page
from app.api.route import ServiceRoute, without_turn
from app.board.dependencies import BoardDep

router = APIRouter(include_in_schema=False, route_class=ServiceRoute)


@router.get("/")
@without_turn  # because it may wait for the checks of the health
async def read_overview(request: Request, board: BoardDep, client: ClientDep) -> HTMLResponse:
    """Show how the tasks and the parts of the service are doing."""
    numbers = await board.numbers.read(client)
    html = await board.numbers.html(numbers, request.scope.get("root_path", ""))
    return page(
        request,
        "board/overview.html",
        numbers_html=html,
        is_empty=not numbers.has_tasks,
        example=example(request),
    )


@router.get("/board")
@router.get("/board/")
@without_turn
async def redirect_to_overview() -> Response:
    """Lead to the overview from the address that its name suggests."""
    return see_other("/")
