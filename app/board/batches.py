"""GET /board/batches: the batches, with a progress bar each."""

import asyncio
from contextlib import suppress
from typing import Annotated

from fastapi import APIRouter, Query, Request
from fastapi.responses import HTMLResponse

from afterward.engine import Engine
from afterward.errors import BatchNotFound
from app.api.dependencies import ClientDep, QueueDep
from app.api.page_texts import query_with
from app.api.pages import page
from app.api.route import ServiceRoute
from app.api.schemas import BatchView, SearchText
from app.board.dependencies import BoardDep

LISTED = 20

router = APIRouter(include_in_schema=False, route_class=ServiceRoute)


@router.get("/board/batches")
async def list_batches(
    request: Request,
    queue: QueueDep,
    client: ClientDep,
    board: BoardDep,
    after: Annotated[SearchText | None, Query(max_length=64)] = None,
) -> HTMLResponse:
    """List the batches of the client, newest first. Their tasks are on the page of the tasks."""
    batches, last = await board.reads.of(_read_batches, queue.engine, client, after).get()
    return page(
        request,
        "board/batches.html",
        batches=batches,
        older=query_with(request, after=last) if last else None,
        newest=query_with(request, after=None) if after else None,
    )


async def _read_batches(
    engine: Engine, client: str, after: str | None
) -> tuple[list[BatchView], str | None]:
    """Return a page of batches; if there are older ones, also the id after which these begin."""
    ids = await engine.list_batches(client, after=after, limit=LISTED + 1)
    counted = await asyncio.gather(*(_count(engine, batch_id, client) for batch_id in ids[:LISTED]))
    batches = [batch for batch in counted if batch is not None]
    return batches, ids[LISTED - 1] if len(ids) > LISTED else None


async def _count(engine: Engine, batch_id: str, client: str) -> BatchView | None:
    """Return a batch; None if retention has removed it since it was listed."""
    with suppress(BatchNotFound):
        return BatchView.of(batch_id, await engine.count_batch(batch_id, client=client))
    return None
