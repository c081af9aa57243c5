"""Finds tasks by a TaskFilter: the pages of a list, counts, and the groups of failed tasks.

A page takes milliseconds among a million tasks, because every filter is read from sorted ranges of
an index, down to the limit. For example, the newest 50 failed tasks of any kind are the newest of

    tasks_by_state:  client = '' AND kind = 'make_thumbnail' AND status = 'failed'
    tasks_by_state:  client = '' AND kind = 'send_email' AND status = 'failed'

and each range is sorted by id, so at most 50 entries of each are read.
"""

import sqlite3
from collections.abc import Sequence
from dataclasses import replace
from operator import attrgetter
from typing import Any, NamedTuple

from afterward.engines.sqlite.group_commit import in_chunks
from afterward.engines.sqlite.statements import SHORT_COLUMNS, status_list
from afterward.filter import FailureGroup, TaskFilter
from afterward.task import Status, Task, restore_task

_CONDITIONS = {
    "client": "client = :client",
    "kind": "kind = :kind",
    "about": "about = :about",
    "batch_id": "batch_id = :batch_id",
    "request_id": "request_id = :request_id",
    "error_group": "error_group = :error_group",
    "first_id": "id >= :first_id",
    "before_id": "id < :before_id",
    # SQLite reads the row of a task for its created_at. The id is in the index, so most tasks of a
    # count need no row.
    "since": "(id >= :id_after_since OR created_at >= :since)",
    "until": "(id < :id_before_until OR created_at < :until)",
    "unchanged_since": "updated_at <= :unchanged_since",
}

# The indexes by a value that few tasks have. The other conditions choose from these tasks.
_BY_VALUE = {
    "request_id": "tasks_by_request",
    "about": "tasks_about",
    "batch_id": "tasks_by_batch",
}

Values = dict[str, Any]


def list_tasks(
    connection: sqlite3.Connection, wanted: TaskFilter, after: str | None, limit: int
) -> list[Task]:
    """Return a page of tasks, in descending order of their ids. See Engine.list_tasks."""
    newest = find(connection, wanted, after, limit)
    if not newest:
        return []
    rows = connection.execute(
        f"SELECT {SHORT_COLUMNS} FROM tasks WHERE seq IN ({', '.join('?' * len(newest))})",
        [found.seq for found in newest],
    )
    return sorted(map(restore_task, rows), key=attrgetter("id"), reverse=True)


class Found(NamedTuple):
    """A task that matches a filter."""

    id: str
    seq: int
    kind: str


def find(
    connection: sqlite3.Connection, wanted: TaskFilter, after: str | None, limit: int
) -> list[Found]:
    """Find up to `limit` tasks below the id `after`, in descending order of their ids."""
    ranges, values = _ranges(connection, wanted, after)
    newest: list[Found] = []
    for some in in_chunks(ranges):
        rows = connection.execute(_newest(some), values | {"limit": limit})
        newest += map(Found._make, rows)
    return sorted(newest, reverse=True)[:limit]


def _newest(ranges: Sequence[str]) -> str:
    """Return the query for the newest tasks of each range, up to :limit."""
    return " UNION ALL ".join(
        f"SELECT * FROM (SELECT id, seq, kind FROM {tasks} ORDER BY id DESC LIMIT :limit)"
        for tasks in ranges
    )


def count_tasks(connection: sqlite3.Connection, wanted: TaskFilter) -> int:
    """Return the number of tasks that match."""
    if not wanted.possible_statuses:
        return 0
    if not wanted.is_by_value:  # then SQLite counts the entries of an index, and reads no task
        wanted = replace(wanted, statuses=wanted.possible_statuses)
    ranges, values = _ranges(connection, wanted)
    counts = (connection.execute(f"SELECT count(*) FROM {tasks}", values) for tasks in ranges)
    return sum(count for rows in counts for (count,) in rows)


def _ranges(
    connection: sqlite3.Connection, wanted: TaskFilter, after: str | None = None
) -> tuple[Sequence[str], Values]:
    """Return the ranges of the wanted tasks, as SQL to follow FROM, and the parameters.

    No task is in two ranges. The statements name the index, because SQLite has no statistics.
    """
    values: Values = {
        "client": wanted.client,
        "kind": wanted.kind,
        "about": wanted.about,
        "batch_id": wanted.batch_id,
        "request_id": wanted.request_id,
        "error_group": wanted.error,
        "first_id": wanted.first_id,
        "before_id": wanted.before_id(after),
        "since": wanted.since,
        "id_after_since": wanted.id_after_since,
        "until": wanted.until,
        "id_before_until": wanted.id_before_until,
        "unchanged_since": wanted.unchanged_since,
    }
    given = {name: sql for name, sql in _CONDITIONS.items() if values[name] is not None}
    statuses = wanted.possible_statuses
    if not statuses:  # for example, failed tasks among the queued ones
        return [], values
    if wanted.selects_states:
        given["status"] = f"status IN {status_list(statuses)}"
    if wanted.not_kinds:
        left_out = {f"not_kind_{n}": kind for n, kind in enumerate(wanted.not_kinds)}
        values |= left_out
        given["not_kinds"] = f"kind NOT IN ({', '.join(f':{name}' for name in left_out)})"

    # 1. By a value that few tasks have.
    for name, index in _BY_VALUE.items():
        if name in given:
            return [_range(index, *given.values())], values

    # 2. By the client alone. SQLite uses a partial index only if the query repeats its condition.
    if given.keys().isdisjoint({"kind", "not_kinds", "status"}):
        if wanted.client:
            return [_range("tasks_by_client", *given.values(), "client <> ''")], values
        return [f"tasks WHERE {' AND '.join(given.values())}"], values

    # 3. By the state: a range for each kind and status.
    kinds = [wanted.kind] if wanted.kind is not None else kinds_of(connection, wanted.client)
    of_kind = {f"kind_{n}": kind for n, kind in enumerate(kinds) if kind not in wanted.not_kinds}
    others = [sql for name, sql in given.items() if name not in {"kind", "not_kinds", "status"}]
    index = "tasks_by_state" if wanted.error is None else "tasks_by_error"
    ranges = [
        _range(index, f"kind = :{kind}", f"status = '{status}'", "status <> 'running'", *others)
        for kind in of_kind
        for status in statuses
        if status is not Status.RUNNING
    ]
    # Running tasks are few, and have an index of their own.
    if Status.RUNNING in statuses:
        ranges.append(_range("tasks_held", "status = 'running'", *given.values()))
    return ranges, values | of_kind


def _range(index: str, *conditions: str) -> str:
    return f"tasks INDEXED BY {index} WHERE {' AND '.join(conditions)}"


def kinds_of(connection: sqlite3.Connection, client: str) -> list[str]:
    """Return the kinds of a client's tasks, by a loose index scan like _WAITING_KINDS.

    Kinds are left out if all their tasks are running.
    """
    rows = connection.execute(
        """
        WITH RECURSIVE kinds (kind) AS (
            SELECT (SELECT min(kind) FROM tasks INDEXED BY tasks_by_state
                    WHERE client = :client AND status <> 'running')
            UNION ALL
            SELECT (SELECT min(tasks.kind) FROM tasks INDEXED BY tasks_by_state
                    WHERE client = :client AND tasks.kind > kinds.kind AND status <> 'running')
            FROM kinds WHERE kinds.kind IS NOT NULL
        )
        SELECT kind FROM kinds WHERE kind IS NOT NULL
        """,
        {"client": client},
    )
    return [kind for (kind,) in rows]


def count_failures(connection: sqlite3.Connection, client: str) -> list[FailureGroup]:
    """Return the groups of a client's failed tasks, the largest first."""
    rows = connection.execute(
        """
        SELECT kind, error_group, count(*) FROM tasks INDEXED BY tasks_by_error
        WHERE client = ? AND status = 'failed' GROUP BY kind, error_group ORDER BY count(*) DESC
        """,
        (client,),
    )
    return [FailureGroup(*row) for row in rows]


def list_failed(connection: sqlite3.Connection, client: str, limit: int) -> list[Task]:
    """Return a client's failed tasks, the latest failure first."""
    rows = connection.execute(
        f"""
        SELECT {SHORT_COLUMNS} FROM tasks INDEXED BY tasks_failed
        WHERE client = ? AND status = 'failed' ORDER BY finished_at DESC LIMIT ?
        """,
        (client, limit),
    )
    return [restore_task(row) for row in rows]


def list_batches(
    connection: sqlite3.Connection, client: str, after: str | None, limit: int
) -> list[str]:
    """Return the ids of a client's batches, newest first, by a loose index scan.

    Look up the last id in the index, then the last id below it, and so on. So a batch of 1,000
    tasks costs one look-up.
    """
    rows = connection.execute(
        """
        WITH RECURSIVE batches (id) AS (
            SELECT :after
            UNION ALL
            SELECT (SELECT max(batch_id) FROM tasks INDEXED BY tasks_by_batch
                    WHERE client = :client AND batch_id < batches.id AND batch_id IS NOT NULL)
            FROM batches WHERE batches.id IS NOT NULL
            LIMIT :limit + 1
        )
        SELECT id FROM batches WHERE id IS NOT NULL LIMIT :limit OFFSET 1
        """,
        {"client": client, "after": after or "~", "limit": limit},  # "~" is above every id
    )
    return [batch_id for (batch_id,) in rows]


def oldest_queued(connection: sqlite3.Connection, client: str) -> float | None:
    """Return the due time of a client's oldest queued task. See Engine.oldest_queued."""
    oldest = [
        connection.execute(
            """
            SELECT id, due_at FROM tasks INDEXED BY tasks_by_state
            WHERE client = ? AND kind = ? AND status = 'queued' AND status <> 'running'
            ORDER BY id LIMIT 1
            """,
            (client, kind),
        ).fetchone()
        for kind in kinds_of(connection, client)
    ]
    _, due_at = min(filter(None, oldest), default=(None, None))
    return due_at
