"""Does a slice of a bulk action, in the transaction of its caller. See afterward.bulk."""

from collections.abc import Callable, Sequence

from afterward.bulk import Action, BulkProgress, Slice
from afterward.engines.postgres import search, statements
from afterward.engines.postgres.connections import Session
from afterward.engines.postgres.statements import SHORT_COLUMNS, Row
from afterward.filter import TaskFilter
from afterward.history import newest_attempts
from afterward.retry import Bounds
from afterward.task import Task, Writes


async def change_slice(
    session: Session,
    task: Task,
    wanted: TaskFilter,
    limit: int,
    most: int,
    bounds_of: Callable[[str], Bounds],
    now: float,
) -> Slice | None:
    """Do the next slice of the action of `task`. See Engine.change_slice."""
    # 1. Read how far the slices before have come, and find the next tasks. The lock of the record
    #    keeps out another slice of this action, whose caller was cut off before its reply came.
    record = await statements.lock_record(session, BulkProgress().as_record(task, now))
    progress = BulkProgress.of(record)
    limit = min(limit, most - progress.done)
    found = await search.find(session, wanted, progress.cursor, limit + 1)
    is_last, found = len(found) <= limit, found[:limit]

    # 2. Lock the tasks that still match, and the durable task of the action. So no other worker can
    #    claim it and do the same slice, and no worker can claim a task that is being cancelled.
    locked = await _lock(session, task, found, wanted)
    if locked is None:
        return None
    kinds = {row["id"]: row["kind"] for row in found if row["id"] in locked}

    # 3. Change them.
    rows = await (
        statements.queue_again(
            session,
            {task_id: bounds_of(kind) for task_id, kind in kinds.items()},
            now,
            SHORT_COLUMNS,
        )
        if wanted.allows is Action.RETRY
        else statements.cancel(session, [*kinds], now, SHORT_COLUMNS)
    )

    # 4. Write how far the action has come. The crashes before this slice do not count any more,
    #    because the action makes progress. There may be any number of them, so the history forgets
    #    the oldest.
    progress = progress.after([row["id"] for row in found], len(rows))
    await statements.write(session, [Writes(records=(progress.as_record(task, now),))])
    await session.execute(
        "UPDATE afterward.tasks SET crashes = 0, history = $2 WHERE id = $1 AND crashes > 0",
        task.id,
        newest_attempts(task.history),
    )
    changed = tuple(map(statements.to_task, rows))
    return Slice(changed, progress.done, is_last=is_last or progress.done == most)


async def _lock(
    session: Session, task: Task, found: Sequence[Row], wanted: TaskFilter
) -> set[str] | None:
    """Lock the task of the action and the found tasks. Return the ids of those that still match.

    Returns None if the worker has lost its claim to the action. An action may find its own task,
    once it is re-queued, so the id alone does not tell that the worker holds it.

    Other transactions may have changed a task since it was found. PostgreSQL compares the
    conditions with the newest version of each row, after it has waited for the lock.
    """
    rows = await session.fetch(
        """
        SELECT id, id = $1 AND status = 'running' AND claims = $2 AS is_held FROM afterward.tasks
        WHERE (id = $1 AND status = 'running' AND claims = $2)
        OR (id = ANY($3::text[]) AND status = ANY($4::text[])
            AND ($5::float8 IS NULL OR updated_at <= $5))
        ORDER BY seq + 0 FOR UPDATE  -- see statements.end_attempts
        """,
        task.id,
        task.claims,
        [row["id"] for row in found],
        wanted.possible_statuses,
        wanted.unchanged_since,
    )
    is_held = any(row["is_held"] for row in rows)
    return {row["id"] for row in rows} if is_held else None
