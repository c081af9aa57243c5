"""Removes old tasks and answers, in the session of its caller."""

from afterward.bulk import COLLECTION
from afterward.engines.postgres.connections import Session
from afterward.engines.postgres.statements import row_count


async def purge_tasks(
    session: Session, finished_before: float, failed_before: float, limit: int
) -> int:
    """Remove up to `limit` old tasks, and what goes with them. Returns the number of the tasks."""
    removed = await session.execute(
        """
        WITH finished AS (
            SELECT seq FROM afterward.tasks WHERE finished_at < $1 AND status <> 'failed'
            ORDER BY finished_at LIMIT $3 FOR UPDATE SKIP LOCKED
        ), failed AS (
            SELECT seq FROM afterward.tasks WHERE finished_at < $2 AND status = 'failed'
            ORDER BY finished_at LIMIT $3 FOR UPDATE SKIP LOCKED
        )
        DELETE FROM afterward.tasks WHERE seq IN (
            SELECT seq FROM finished UNION ALL SELECT seq FROM failed LIMIT $3
        )
        """,
        finished_before,
        failed_before,
        limit,
    )
    # The counts of a batch go with the last of its tasks.
    await session.execute(
        """
        DELETE FROM afterward.removed WHERE NOT EXISTS (
            SELECT FROM afterward.tasks
            WHERE tasks.client = removed.client AND tasks.batch_id = removed.batch_id
        )
        """
    )
    # The record of a bulk action goes with its task.
    await session.execute(
        """
        DELETE FROM afterward.records WHERE collection = $1
        AND NOT EXISTS (SELECT FROM afterward.tasks WHERE tasks.id = records.id)
        """,
        COLLECTION,
    )
    # Replace the rows of afterward.counts by their sums.
    await session.execute(
        """
        WITH gone AS (DELETE FROM afterward.counts RETURNING status, tasks)
        INSERT INTO afterward.counts SELECT status, sum(tasks) FROM gone GROUP BY status
        """
    )
    return row_count(removed)


async def purge_answers(session: Session, answered_before: float, limit: int) -> int:
    """Remove up to `limit` old answers, and return their number."""
    removed = await session.execute(
        """
        DELETE FROM afterward.answers WHERE key IN (
            SELECT key FROM afterward.answers WHERE created_at < $1
            ORDER BY created_at LIMIT $2 FOR UPDATE SKIP LOCKED
        )
        """,
        answered_before,
        limit,
    )
    return row_count(removed)
