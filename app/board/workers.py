"""GET /board/workers: the workers of all processes, with their heartbeat."""

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse

from app.api.dependencies import QueueDep
from app.api.pages import page
from app.api.route import ServiceRoute
from app.tasks.workers import EVERY_SECONDS, list_workers

router = APIRouter(include_in_schema=False, route_class=ServiceRoute)


@router.get("/board/workers")
async def read_workers(request: Request, queue: QueueDep) -> HTMLResponse:
    """List the workers. All clients see the same ones, because they run the tasks of all."""
    workers = await list_workers(queue.engine, queue.now())
    return page(request, "board/workers.html", workers=workers, every=EVERY_SECONDS)
