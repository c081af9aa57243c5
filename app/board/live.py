"""GET /board/live: the stream of ticks, by which the open pages learn that something changed."""

from collections.abc import AsyncGenerator
from typing import Annotated

from fastapi import APIRouter, Query, Request, Response

from app.api.dependencies import ClientDep
from app.api.route import ServiceRoute, without_turn
from app.api.server_sent_events import HEARTBEAT, RETRY, EventStreamResponse
from app.board.dependencies import BoardDep
from app.board.ticks import Part, Viewer

router = APIRouter(include_in_schema=False, route_class=ServiceRoute)


@router.get("/board/live")
@without_turn
async def read_ticks(
    request: Request,
    board: BoardDep,
    client: ClientDep,
    part: Annotated[Part, Query()] = None,
) -> Response:
    """Follow the changes of the client's tasks. `part` says which ticks the page needs."""
    viewer = board.ticks.viewer(client, part, request.scope.get("root_path", ""))
    return EventStreamResponse(viewer, _write_ticks)


async def _write_ticks(viewer: Viewer) -> AsyncGenerator[bytes, None]:
    yield RETRY + HEARTBEAT
    async for frame in viewer:
        yield frame
