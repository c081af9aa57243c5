"""What operators and passers-by ask: alive? ready? how busy? and what is there at all?"""

import asyncio
from collections.abc import Awaitable
from http import HTTPStatus

from fastapi import APIRouter, Response
from fastapi.responses import HTMLResponse, PlainTextResponse

from app.api.dependencies import MailerDep, MetricsDep, QueueDep, SettingsDep, UploadsDep
from app.api.pages import page
from app.api.problems import documented
from app.api.routes import Route, without_turn
from app.api.schemas import Readiness
from app.queue.errors import QueueError

CHECK_SECONDS = 3.0

router = APIRouter(tags=["operations"], route_class=Route)


@router.get("/", response_class=HTMLResponse, responses=documented())
@without_turn
async def home(settings: SettingsDep) -> HTMLResponse:
    """A plain page that links to what there is."""
    return page("home.html", catcher=settings.catcher)


@router.get("/livez", response_class=PlainTextResponse)
@without_turn
async def livez() -> PlainTextResponse:
    """The process is alive, and its event loop turns."""
    return PlainTextResponse("ok")


@router.get("/readyz", responses={503: {"model": Readiness}})
@without_turn
async def readyz(
    response: Response, queue: QueueDep, uploads: UploadsDep, mailer: MailerDep
) -> Readiness:
    """Whether requests can be accepted. Without SMTP they can: mail waits in the queue."""
    database, files, smtp = await asyncio.gather(
        _passes(_answers(queue.engine.check())), _passes(uploads.check()), _passes(mailer.check())
    )
    checks = {
        "database": "ok" if database else "failing",
        "uploads": "ok" if files else "failing",
        "smtp": "ok" if smtp else "degraded",
    }
    if not (database and files):
        response.status_code = HTTPStatus.SERVICE_UNAVAILABLE
        return Readiness(status="unready", checks=checks)
    return Readiness(status="ready" if smtp else "degraded", checks=checks)


async def _passes(check: Awaitable[bool]) -> bool:
    asking = asyncio.ensure_future(check)
    done, _ = await asyncio.wait([asking], timeout=CHECK_SECONDS)
    asking.cancel()  # and not waited for: a database that hangs does not let go at once
    return bool(done) and asking.result()


async def _answers(check: Awaitable[None]) -> bool:
    try:
        await check
    except QueueError:
        return False
    return True


@router.get("/metrics", response_class=PlainTextResponse, responses=documented(503))
async def read_metrics(queue: QueueDep, metrics: MetricsDep) -> Response:
    """Prometheus' text format."""
    backlog = await queue.engine.backlog()
    return Response(
        metrics.exposition(backlog, queue.now()),
        media_type="text/plain; version=0.0.4; charset=utf-8",
    )
