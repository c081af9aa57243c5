"""POST /tasks/retry and POST /tasks/cancel: retry or cancel all tasks that match a filter."""

from typing import Annotated, Any

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from afterward.bulk import Action
from afterward.fastapi import DurableTasks
from app.api.dependencies import ClientDep, QueueDep
from app.api.errors import documented
from app.api.route import ServiceRoute
from app.api.schemas import Queued
from app.api.task_actions import add_action, count_matches
from app.api.task_filters import TaskFilters

router = APIRouter(tags=["tasks"], route_class=ServiceRoute)


def _check_not_empty(filters: TaskFilters) -> TaskFilters:
    if not filters.model_dump(exclude_none=True):
        raise ValueError("must have at least one condition, because no condition selects all tasks")
    return filters


class BulkAction(BaseModel):
    """The tasks to act on, and whether they are only to be counted."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={"examples": [{"filter": {"error": "PermanentError 550"}}]},
    )

    filter: Annotated[
        TaskFilters,
        AfterValidator(_check_not_empty),
        Field(
            description="At least one condition that is not null.",
            json_schema_extra={"minProperties": 1},
        ),
    ]
    dry_run: Annotated[bool, Field(strict=True)] = False


class MatchCount(BaseModel):
    """The number of tasks on which the action would act."""

    matches: int


_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {"model": MatchCount, "description": "The number of tasks, for a dry run."},
    **documented(409, 413, 415, 422, 503, 507),
}


@router.post("/tasks/retry", status_code=202, response_model=Queued, responses=_RESPONSES)
@router.post("/tasks/retry/", status_code=202, response_model=Queued, include_in_schema=False)
async def retry_tasks(
    body: BulkAction, queue: QueueDep, client: ClientDep, durable_tasks: DurableTasks
) -> Queued | Response:
    """Queue all failed and cancelled tasks again that match the filter.

    A durable task does it in slices. Its result has how many tasks `matched`, were `done`, and were
    `skipped` because they had changed in the meantime. A task that fails later than this request is
    not retried. Actions on many tasks are themselves only retried if the filter names their `kind`.
    With `dry_run`, the tasks are only counted.
    """
    return await _act(Action.RETRY, body, queue, client, durable_tasks)


@router.post("/tasks/cancel", status_code=202, response_model=Queued, responses=_RESPONSES)
@router.post("/tasks/cancel/", status_code=202, response_model=Queued, include_in_schema=False)
async def cancel_tasks(
    body: BulkAction, queue: QueueDep, client: ClientDep, durable_tasks: DurableTasks
) -> Queued | Response:
    """Cancel all queued and retrying tasks that match the filter.

    A durable task does it in slices. Its result has how many tasks `matched`, were `done`, and were
    `skipped` because they had changed in the meantime. A task that is created later than this
    request is not cancelled. Actions on many tasks are themselves only cancelled if the filter
    names their `kind`. With `dry_run`, the tasks are only counted.
    """
    return await _act(Action.CANCEL, body, queue, client, durable_tasks)


async def _act(
    action: Action,
    body: BulkAction,
    queue: QueueDep,
    client: ClientDep,
    durable_tasks: DurableTasks,
) -> Queued | Response:
    accepted_at = queue.now()
    matched = await count_matches(queue, action, body.filter.for_client(client), accepted_at)
    if body.dry_run:
        return JSONResponse({"matches": matched})
    task = add_action(durable_tasks, action, body.filter, client, accepted_at, matched)
    message = "Retry queued" if action is Action.RETRY else "Cancellation queued"
    return Queued.of(task, message)
