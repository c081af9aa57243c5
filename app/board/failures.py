"""GET /board/failures: the failed tasks in groups of the same kind and error."""

import asyncio
from dataclasses import dataclass
from urllib.parse import urlencode

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse

from afterward.engine import Engine
from afterward.filter import FailureGroup, TaskFilter
from afterward.task import Status, Task
from app.api.dependencies import ClientDep, QueueDep
from app.api.pages import page
from app.api.route import ServiceRoute
from app.api.schemas import TaskFailure
from app.board.dependencies import BoardDep

MOST_GROUPS = 100

router = APIRouter(include_in_schema=False, route_class=ServiceRoute)


@dataclass(frozen=True, slots=True)
class FailureRow:
    """A group of failed tasks as a row of the table, with its newest task.

    `newest` is the task that was created last, or None if no task of the group is left.
    """

    group: FailureGroup
    newest: Task | None

    @property
    def detail(self) -> str:
        """The first line of the newest task's error."""
        if self.newest is None or self.newest.error is None:
            return ""
        lines = TaskFailure.of(self.newest.error).detail.strip().splitlines()
        return lines[0] if lines else ""

    @property
    def query(self) -> str:
        """The query of a search for the tasks of this group."""
        return urlencode({"status": "failed", "kind": self.group.kind, "error": self.group.error})


@router.get("/board/failures")
async def read_failures(
    request: Request, queue: QueueDep, client: ClientDep, board: BoardDep
) -> HTMLResponse:
    """Show the groups, the largest first."""
    groups, newest = await board.reads.of(_read_groups, queue.engine, client).get()
    shown = groups[:MOST_GROUPS]
    return page(
        request,
        "board/failures.html",
        failures=[FailureRow(group, task) for group, task in zip(shown, newest, strict=True)],
        left_out=len(groups) - len(shown),
        total=sum(group.tasks for group in groups),
    )


async def _read_groups(engine: Engine, client: str) -> tuple[list[FailureGroup], list[Task | None]]:
    """Return all groups, the largest first, and the newest task of each that is shown."""
    groups = await engine.count_failures(client)
    shown = groups[:MOST_GROUPS]
    newest = await asyncio.gather(*(_newest(engine, client, group) for group in shown))
    return groups, newest


async def _newest(engine: Engine, client: str, group: FailureGroup) -> Task | None:
    """Return the newest task of a group as it is listed: without arguments, which can be large."""
    wanted = TaskFilter(
        client=client, statuses=(Status.FAILED,), kind=group.kind, error=group.error
    )
    return next(iter(await engine.list_tasks(wanted, limit=1)), None)
