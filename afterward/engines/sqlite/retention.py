"""Removes old tasks and answers, in the transaction of its caller."""

import sqlite3

from afterward.bulk import COLLECTION
from afterward.task import to_json


def purge_tasks(
    connection: sqlite3.Connection, finished_before: float, failed_before: float, limit: int
) -> int:
    """Remove up to `limit` old tasks, and what goes with them. Returns the number of the tasks."""
    removed = connection.execute(
        """
        DELETE FROM tasks WHERE seq IN (
            SELECT * FROM (SELECT seq FROM tasks INDEXED BY tasks_finished
                WHERE finished_at < ? AND status <> 'failed' ORDER BY finished_at LIMIT ?)
            UNION ALL
            SELECT * FROM (SELECT seq FROM tasks INDEXED BY tasks_failed
                WHERE finished_at < ? AND status = 'failed' ORDER BY finished_at LIMIT ?)
            LIMIT ?
        ) RETURNING id, batch_id
        """,
        (finished_before, limit, failed_before, limit, limit),
    ).fetchall()
    task_ids, batch_ids = [task_id for task_id, _ in removed], {batch_id for _, batch_id in removed}
    # The record of a bulk action goes with its task.
    connection.execute(
        "DELETE FROM records WHERE collection = ? AND id IN (SELECT value FROM json_each(?))",
        (COLLECTION, to_json(task_ids)),
    )
    # The counts of a batch go with the last of its tasks.
    connection.execute(
        """
        DELETE FROM removed WHERE batch_id IN (SELECT value FROM json_each(?))
        AND NOT EXISTS (
            SELECT 1 FROM tasks INDEXED BY tasks_by_batch
            WHERE tasks.client = removed.client AND tasks.batch_id = removed.batch_id
        )
        """,
        (to_json([*batch_ids]),),
    )
    return len(removed)


def purge_answers(connection: sqlite3.Connection, answered_before: float, limit: int) -> int:
    """Remove up to `limit` old answers, and return their number."""
    return connection.execute(
        """
        DELETE FROM answers WHERE key IN
            (SELECT key FROM answers WHERE created_at < ? ORDER BY created_at LIMIT ?)
        """,
        (answered_before, limit),
    ).rowcount
