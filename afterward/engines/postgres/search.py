"""Finds tasks by a TaskFilter: the pages of a list, counts, and the groups of failed tasks.

A page takes milliseconds among a million tasks, because every filter is read from sorted ranges of
an index, down to the limit. For example, the newest 50 failed tasks of any kind are the newest of

    tasks_by_state:  client = '' AND kind = 'make_thumbnail' AND status = 'failed'
    tasks_by_state:  client = '' AND kind = 'send_email' AND status = 'failed'

and each range is sorted by id, so at most 50 entries of each are read.
"""

from collections.abc import Sequence
from typing import Any

from afterward.engines.postgres.connections import Session
from afterward.engines.postgres.statements import SHORT_COLUMNS, Row, to_task
from afterward.filter import FailureGroup, TaskFilter
from afterward.task import Status, Task


async def list_tasks(
    session: Session, wanted: TaskFilter, after: str | None, limit: int
) -> list[Task]:
    """Return a page of tasks, in descending order of their ids. See Engine.list_tasks."""
    return [to_task(row) for row in await _page(session, SHORT_COLUMNS, wanted, after, limit)]


async def find(
    session: Session, wanted: TaskFilter, after: str | None, limit: int
) -> Sequence[Row]:
    """Find up to `limit` tasks below the id `after`, in descending order of their ids.

    Returns the id and the kind of each. It locks none.
    """
    return await _page(session, "tasks.id, tasks.kind", wanted, after, limit)


async def _page(
    session: Session, columns: str, wanted: TaskFilter, after: str | None, limit: int
) -> Sequence[Row]:
    ranges, where, values = _ranges(wanted, after)
    return await session.fetch(
        f"""
        {ranges} SELECT found.* FROM ranges, LATERAL (
            SELECT {columns} FROM afterward.tasks WHERE {where} ORDER BY id DESC LIMIT $1
        ) AS found ORDER BY id DESC LIMIT $1
        """,
        limit,
        *values,
    )


async def count_tasks(session: Session, wanted: TaskFilter) -> int:
    """Return the number of tasks that match."""
    ranges, where, values = _ranges(wanted)
    count: int = await session.fetchval(
        f"""
        {ranges} SELECT coalesce(sum(found.tasks), 0)::bigint FROM ranges, LATERAL (
            SELECT count(*) AS tasks FROM afterward.tasks WHERE {where} AND $1::int IS NULL
        ) AS found
        """,
        None,
        *values,
    )
    return count


def _ranges(wanted: TaskFilter, after: str | None = None) -> tuple[str, str, Sequence[Any]]:
    """Return the definition of `ranges`, the condition for the tasks of a range, and the values.

    The values are the parameters from $2 on. Conditions that the filter does not have are left out,
    so that PostgreSQL plans each combination of filters by itself.
    """
    values: list[Any] = []

    def parameter(value: object) -> str:
        values.append(value)
        return f"${len(values) + 1}"

    given = {
        "client =": wanted.client,
        "kind =": wanted.kind,
        "about =": wanted.about,
        "batch_id =": wanted.batch_id,
        "request_id =": wanted.request_id,
        "error_group =": wanted.error,
        "id >=": wanted.first_id,
        "id <": wanted.before_id(after),
        "created_at >=": wanted.since,
        "created_at <": wanted.until,
        "updated_at <=": wanted.unchanged_since,
    }
    where = [f"{sql} {parameter(value)}" for sql, value in given.items() if value is not None]
    if wanted.not_kinds:
        where.append(f"kind <> ALL({parameter(wanted.not_kinds)}::text[])")
    statuses = wanted.possible_statuses if wanted.selects_states else tuple(Status)

    # 1. By a value that few tasks have, one range.
    if wanted.is_by_value:
        where.append(f"status = ANY({parameter(statuses)}::text[])")
        return "WITH ranges AS (SELECT)", " AND ".join(where), values

    # 2. By the client alone, one range. PostgreSQL uses a partial index only if the query repeats
    #    its condition.
    if not wanted.selects_states and wanted.kind is None:
        where += ["client <> ''"] if wanted.client else []
        return "WITH ranges AS (SELECT)", " AND ".join(where), values

    # 3. By the state: a range for each kind and status. The index tasks_by_error only has failed
    #    tasks, so the query must name their status.
    where.append("status = 'failed'" if wanted.error is not None else "status = ranges.status")
    of_status = f"unnest({parameter(statuses)}::text[]) AS status"
    if wanted.kind is not None:
        return f"WITH ranges AS (SELECT {of_status})", " AND ".join(where), values
    where.append("kind = ranges.kind")
    ranges = f"ranges AS (SELECT kind, status FROM kinds, {of_status} WHERE kind IS NOT NULL)"
    return f"WITH RECURSIVE {KINDS}, {ranges}", " AND ".join(where), values


# The kinds of the tasks of the client $2, by a loose index scan: see statements._WAITING_KINDS.
KINDS = """
    kinds AS (
        (SELECT kind FROM afterward.tasks WHERE client = $2 ORDER BY kind LIMIT 1)
        UNION ALL
        SELECT (SELECT tasks.kind FROM afterward.tasks
                WHERE client = $2 AND tasks.kind > kinds.kind ORDER BY tasks.kind LIMIT 1)
        FROM kinds WHERE kinds.kind IS NOT NULL
    )
"""


async def count_failures(session: Session, client: str) -> list[FailureGroup]:
    """Return the groups of a client's failed tasks, the largest first."""
    rows = await session.fetch(
        """
        SELECT kind, error_group AS error, count(*) AS tasks
        FROM afterward.tasks WHERE client = $1 AND status = 'failed'
        GROUP BY kind, error_group ORDER BY count(*) DESC
        """,
        client,
    )
    return [FailureGroup(**row) for row in rows]


async def list_failed(session: Session, client: str, limit: int) -> list[Task]:
    """Return a client's failed tasks, the latest failure first."""
    rows = await session.fetch(
        f"""
        SELECT {SHORT_COLUMNS} FROM afterward.tasks
        WHERE client = $1 AND status = 'failed' ORDER BY finished_at DESC LIMIT $2
        """,
        client,
        limit,
    )
    return [to_task(row) for row in rows]


async def list_batches(session: Session, client: str, after: str | None, limit: int) -> list[str]:
    """Return the ids of a client's batches, newest first, by a loose index scan.

    Look up the last id in the index, then the last id below it, and so on. So a batch of 1,000
    tasks costs one look-up.
    """
    rows = await session.fetch(
        """
        WITH RECURSIVE batches AS (
            SELECT $2::text COLLATE "C" AS id
            UNION ALL
            SELECT (SELECT batch_id FROM afterward.tasks
                    WHERE client = $1 AND batch_id < batches.id AND batch_id IS NOT NULL
                    ORDER BY batch_id DESC LIMIT 1)
            FROM batches WHERE batches.id IS NOT NULL
        )
        SELECT id FROM batches WHERE id IS NOT NULL LIMIT $3 OFFSET 1
        """,
        client,
        after or "~",  # above every id
        limit,
    )
    return [row["id"] for row in rows]


async def oldest_queued(session: Session, client: str) -> float | None:
    """Return the due time of a client's oldest queued task. See Engine.oldest_queued."""
    due_at: float | None = await session.fetchval(
        f"""
        WITH RECURSIVE {KINDS}
        SELECT oldest.due_at FROM kinds, LATERAL (
            SELECT id, due_at FROM afterward.tasks
            WHERE client = $2 AND kind = kinds.kind AND status = 'queued' AND $1::int IS NULL
            ORDER BY id LIMIT 1
        ) AS oldest ORDER BY oldest.id LIMIT 1
        """,
        None,
        client,
    )
    return due_at
