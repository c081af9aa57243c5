"""Bulk actions, as the routes and the pages offer them: count the tasks, and queue the action."""

from typing import Any

from afterward.bulk import Action
from afterward.filter import TaskFilter
from afterward.queue import Queue
from afterward.task import Task
from afterward.unit_of_work import UnitOfWork
from app.api.task_filters import TaskFilters
from app.tasks.bulk import acted_on, cancel_tasks, retry_tasks


async def count_matches(
    queue: Queue[Any],
    action: Action,
    wanted: TaskFilter,
    accepted_at: float | None = None,
) -> int:
    """Count the tasks that the action would change if the service accepted it at `accepted_at`.

    Without `accepted_at`, the time is now. Raises QueueUnavailable.
    """
    at = queue.now() if accepted_at is None else accepted_at
    return await queue.engine.count_tasks(acted_on(wanted, action, at))


def add_action(
    durable_tasks: UnitOfWork[Any],
    action: Action,
    filters: TaskFilters,
    client: str,
    accepted_at: float,
    matched: int,
) -> Task:
    """Add the durable task that retries or cancels all tasks of a client that match the filters.

    `matched` is their number at `accepted_at`, as `count_matches` returned it. The action changes
    these tasks, except those that have changed since. It never changes more than `matched`.
    """
    function = retry_tasks if action is Action.RETRY else cancel_tasks
    return durable_tasks.add_task(
        function, wanted=filters.for_client(client), accepted_at=accepted_at, matched=matched
    )
