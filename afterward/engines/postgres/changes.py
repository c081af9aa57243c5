"""Finds the tasks that have changed since a time, for clients that return to an event stream.

No index is sorted by `updated_at`, because each change of a task would have to write it. But each
state leaves a trace in another index. These ranges have all tasks that have changed since 12:00:

    tasks_finished, tasks_failed   finished_at >= 12:00
    tasks_leased                   all running tasks, because they are few
    tasks_by_state                 all retrying tasks of the client
    tasks_by_state                 its queued tasks with an id of 12:00 or later: new tasks
    tasks_ready                    NOT timed AND ready_at >= 12:00: tasks that a worker has given
                                   back, or a client has queued again, are ready at that moment
    tasks_suspect                  all suspects, because they are few

The first step collects the tasks of these ranges. The second step reads their rows, and keeps the
changed tasks of the client.
"""

from datetime import timedelta

from afterward.engines.postgres.connections import Session
from afterward.engines.postgres.search import KINDS
from afterward.engines.postgres.statements import SHORT_COLUMNS, to_task
from afterward.task import Task, lowest_id

# The order of each range is that of the index to use. Parameters:
#
#   $1  the limit of each range      $4  an id that no task created since $3 is below
#   $2  the client                   $5  the time that has passed since $3, because ready_at is by
#   $3  the beginning, in seconds        the clock of the database
_FIND = f"""
    WITH RECURSIVE {KINDS}
    (SELECT seq FROM afterward.tasks
     WHERE finished_at >= $3 AND status <> 'failed' ORDER BY finished_at LIMIT $1)
    UNION ALL
    (SELECT seq FROM afterward.tasks
     WHERE finished_at >= $3 AND status = 'failed' ORDER BY finished_at LIMIT $1)
    UNION ALL
    (SELECT seq FROM afterward.tasks WHERE status = 'running' ORDER BY lease_until LIMIT $1)
    UNION ALL
    (SELECT seq FROM afterward.tasks
     WHERE status IN ('queued', 'retrying') AND crashes > 0 ORDER BY ready_at, seq LIMIT $1)
    UNION ALL
    SELECT of_kind.seq FROM kinds, LATERAL (
        (SELECT seq FROM afterward.tasks
         WHERE client = $2 AND kind = kinds.kind AND status = 'retrying' ORDER BY id LIMIT $1)
        UNION ALL
        (SELECT seq FROM afterward.tasks
         WHERE client = $2 AND kind = kinds.kind AND status = 'queued' AND id >= $4
         ORDER BY id LIMIT $1)
        UNION ALL
        (SELECT seq FROM afterward.tasks
         WHERE status IN ('queued', 'retrying') AND crashes = 0 AND kind = kinds.kind AND NOT timed
         AND ready_at >= now() - $5::interval ORDER BY ready_at, seq LIMIT $1)
    ) AS of_kind
"""


async def list_changed(
    session: Session, client: str, since: float, now: float, limit: int
) -> list[Task] | None:
    """Return the changed tasks of a client, or None if they are too many. See Engine."""
    age = timedelta(seconds=now - since)
    rows = await session.fetch(_FIND, limit + 1, client, since, lowest_id(since), age)
    found = {row["seq"] for row in rows}
    if len(found) > limit:
        return None
    rows = await session.fetch(
        f"""
        SELECT {SHORT_COLUMNS} FROM afterward.tasks
        WHERE seq = ANY($1::bigint[]) AND client = $2 AND updated_at >= $3
        """,
        list(found),
        client,
        since,
    )
    return sorted(map(to_task, rows), key=lambda task: (task.updated_at, task.id))
