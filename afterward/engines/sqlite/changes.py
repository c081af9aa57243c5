"""Finds the tasks that have changed since a time, for clients that return to an event stream.

No index is sorted by `updated_at`, because each change of a task would have to write it. But each
state leaves a trace in another index. These ranges have all tasks that have changed since 12:00:

    tasks_finished, tasks_failed   finished_at >= 12:00
    tasks_held                     all running tasks, because they are few
    tasks_by_state                 all retrying tasks of the client
    tasks_by_state                 its queued tasks with an id of 12:00 or later: new tasks
    tasks_due                      timed = 0 AND due_at >= 12:00: tasks that a worker has given
                                   back, or a client has queued again, are due at that moment
    tasks_suspect                  all suspects, because they are few

The first step collects the tasks of these ranges, from the indexes alone. The second step reads
their rows, and keeps the changed tasks of the client.
"""

import json
import sqlite3
from collections.abc import Sequence
from functools import cache
from typing import Any

from afterward.engines.sqlite.group_commit import in_chunks
from afterward.engines.sqlite.search import kinds_of
from afterward.engines.sqlite.statements import SHORT_COLUMNS, status_list, to_task
from afterward.task import WAITING, Task, lowest_id

_WAITS = f"status IN {status_list(WAITING)}"
_DUE_AT_ONCE = f"{_WAITS} AND crashes = 0 AND timed = 0"
_OF_CLIENT = "client = :client AND status <> 'running'"
# Ranges, as SQL to follow `FROM tasks INDEXED BY`. Each repeats the condition of its partial index.
_OF_ANY_KIND = (
    "tasks_finished WHERE finished_at >= :since AND status <> 'failed'",
    "tasks_failed WHERE finished_at >= :since AND status = 'failed'",
    "tasks_held WHERE status = 'running'",
    f"tasks_suspect WHERE {_WAITS} AND crashes > 0",
)
_OF_KIND = (
    f"tasks_by_state WHERE {_OF_CLIENT} AND kind = {{kind}} AND status = 'retrying'",
    f"tasks_by_state WHERE {_OF_CLIENT} AND kind = {{kind}} AND status = 'queued' AND id >= :id",
    f"tasks_due WHERE {_DUE_AT_ONCE} AND kind = {{kind}} AND due_at >= :since",
)


def list_changed(
    connection: sqlite3.Connection, client: str, since: float, limit: int
) -> list[Task] | None:
    """Return the changed tasks of a client, or None if they are too many. See Engine."""
    of_kind = {f"kind_{n}": kind for n, kind in enumerate(kinds_of(connection, client))}
    ranges = [*_OF_ANY_KIND]
    ranges += [each.format(kind=f":{kind}") for kind in of_kind for each in _OF_KIND]
    values: dict[str, Any] = {"client": client, "since": since, "limit": limit + 1}
    values |= {"id": lowest_id(since)} | of_kind

    found: set[int] = set()
    for some in in_chunks(ranges):
        found.update(seq for (seq,) in connection.execute(_up_to_limit(tuple(some)), values))
    if len(found) > limit:
        return None
    rows = connection.execute(
        f"""
        SELECT {SHORT_COLUMNS} FROM tasks WHERE seq IN (SELECT value FROM json_each(:found))
        AND client = :client AND updated_at >= :since
        """,
        {"found": json.dumps([*found]), "client": client, "since": since},
    )
    return sorted(map(to_task, rows), key=lambda task: (task.updated_at, task.id))


@cache
def _up_to_limit(ranges: Sequence[str]) -> str:
    """Return the query for the tasks of each range, up to :limit of each."""
    return " UNION ALL ".join(
        f"SELECT * FROM (SELECT seq FROM tasks INDEXED BY {each} LIMIT :limit)" for each in ranges
    )
