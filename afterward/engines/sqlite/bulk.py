"""Does a slice of a bulk action, in the transaction of its caller. See afterward.bulk."""

import json
import sqlite3
from collections.abc import Callable, Iterable

from afterward.bulk import Action, Reached, Slice
from afterward.engines.sqlite import search, statements
from afterward.engines.sqlite.statements import SHORT_COLUMNS
from afterward.filter import TaskFilter
from afterward.history import newest_attempts
from afterward.retry import Bounds
from afterward.task import Task, Writes, restore_task


def change_slice(
    connection: sqlite3.Connection,
    task: Task,
    wanted: TaskFilter,
    limit: int,
    most: int,
    bounds_of: Callable[[str], Bounds],
    now: float,
) -> Slice | None:
    """Do the next slice of the action of `task`. See Engine.change_slice."""
    # 1. Check that the worker still holds its claim. The crashes before this slice do not count any
    #    more, because the action makes progress. There may be any number of them, so the history
    #    forgets the oldest.
    held = connection.execute(
        """
        UPDATE tasks SET crashes = 0, history = iif(crashes > 0, ?, history)
        WHERE id = ? AND status = 'running' AND claims = ?
        """,
        (newest_attempts(task.history), task.id, task.claims),
    )
    if held.rowcount == 0:
        return None

    # 2. Read how far the slices before have come, and find the next tasks. They cannot change
    #    before step 3, because no other connection writes.
    before = Reached().as_record(task, now)
    reached = Reached.of(statements.find_record(connection, before) or before)
    limit = min(limit, most - reached.done)
    found = search.find(connection, wanted, reached.cursor, limit + 1)
    is_last, found = len(found) <= limit, found[:limit]

    # 3. Change them.
    changed = (
        _retry(connection, found, bounds_of, now)
        if wanted.allows is Action.RETRY
        else _cancel(connection, found, now)
    )

    # 4. Write how far the action has come.
    reached = reached.after([each.id for each in found], len(changed))
    statements.write(connection, Writes(records=(reached.as_record(task, now),)))
    return Slice(tuple(changed), reached.done, is_last=is_last or reached.done == most)


def _retry(
    connection: sqlite3.Connection,
    found: list[search.Found],
    bounds_of: Callable[[str], Bounds],
    now: float,
) -> list[Task]:
    """Queue tasks again, each kind with the bounds of its policy."""
    tasks: list[Task] = []
    for kind in {each.kind for each in found}:
        bounds = bounds_of(kind)
        rows = connection.execute(
            f"{statements.QUEUE_AGAIN} WHERE {_IS_GIVEN} RETURNING {SHORT_COLUMNS}",
            {
                "now": now,
                "max_attempts": bounds.max_attempts,
                "gives_up_at": bounds.gives_up_at,
                "seqs": _as_json(each for each in found if each.kind == kind),
            },
        )
        tasks += map(restore_task, rows)
    return tasks


def _cancel(connection: sqlite3.Connection, found: list[search.Found], now: float) -> list[Task]:
    rows = connection.execute(
        f"{statements.CANCEL} WHERE {_IS_GIVEN} RETURNING {SHORT_COLUMNS}",
        {"now": now, "seqs": _as_json(found)},
    )
    return [restore_task(row) for row in rows]


# One parameter for any number of tasks: '[17,18,23]'.
_IS_GIVEN = "seq IN (SELECT value FROM json_each(:seqs))"


def _as_json(found: Iterable[search.Found]) -> str:
    return json.dumps([each.seq for each in found])
