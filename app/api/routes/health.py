"""Routes for operators: liveness, readiness and metrics."""

from http import HTTPStatus

from fastapi import APIRouter, Response
from fastapi.responses import PlainTextResponse

from app.api.dependencies import HealthDep, MetricsDep, QueueDep
from app.api.errors import documented
from app.api.health_checks import CheckResults
from app.api.route import ServiceRoute, without_turn
from app.api.schemas import Readiness
from app.tasks.workers import list_workers

router = APIRouter(tags=["health"], route_class=ServiceRoute)


@router.get("/livez", response_class=PlainTextResponse)
@without_turn
async def livez() -> PlainTextResponse:
    """Answer 200, which shows that the process is alive and its event loop runs."""
    return PlainTextResponse("ok\n")


@router.get("/readyz", responses={503: {"model": Readiness}})
@without_turn
async def readyz(response: Response, health: HealthDep) -> Readiness:
    """Tell whether the service accepts requests. Without SMTP it does: mail waits in the queue."""
    passed = await health.check()
    checks = {
        "database": _describe_database(passed),
        "uploads": "ok" if passed.uploads else "failing",
        "smtp": "ok" if passed.smtp else "degraded",
    }
    if not (passed.database and passed.uploads):
        response.status_code = HTTPStatus.SERVICE_UNAVAILABLE
        return Readiness(status="unready", checks=checks)
    return Readiness(status="ready" if passed.smtp else "degraded", checks=checks)


def _describe_database(passed: CheckResults) -> str:
    if passed.database:
        return "ok"
    return "damaged" if passed.database_is_damaged else "failing"


@router.get("/metrics", response_class=PlainTextResponse, responses=documented(503))
@without_turn  # because it may wait for the checks of the health
async def read_metrics(queue: QueueDep, metrics: MetricsDep, health: HealthDep) -> Response:
    """Return the metrics in the text format of Prometheus."""
    now = queue.now()
    backlog = await queue.engine.backlog()
    workers = await list_workers(queue.engine, now)
    passed = await health.check()
    return Response(
        metrics.exposition(
            backlog,
            now,
            workers=sum(worker.is_alive for worker in workers),
            checks={
                "database": passed.database,
                "uploads": passed.uploads,
                "smtp": passed.smtp,
            },
            database_is_damaged=passed.database_is_damaged,
        ),
        media_type="text/plain; version=0.0.4; charset=utf-8",
    )
