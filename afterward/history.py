"""The history of a task: its failed attempts, as JSON in the task's row.

An attempt that succeeds adds nothing, because the row has its start, its end and its worker.
"""

import json
from typing import Any

from afterward.task import Task, to_json

MOST_KEPT = 20  # of the failed attempts of a task, the newest


def error_group(error: str | None) -> str | None:
    """Return the type of an error, with its SMTP code if it has one: `PermanentError 550`.

    Failed tasks are counted and retried by this group. None for no error.
    """
    if error is None:
        return None
    described = json.loads(error)
    kind, code = described.get("type", "Unknown"), described.get("smtp_code")
    return f"{kind}" if code is None else f"{kind} {code}"


def with_failure(task: Task, error: str | None, ended_at: float) -> str:
    """Return the history of a task after the attempt that has just failed.

    `task` is the task as it was claimed, and `error` the error of the attempt, as JSON. Example:

        [{"attempt": 1, "started_at": 1700000000.0, "seconds": 0.2, "worker": "mail-1:4711:5f2a",
          "error": {"type": "TemporaryError", "detail": "..."}}]
    """
    started_at = ended_at if task.started_at is None else task.started_at
    attempt = {
        "attempt": task.attempts,
        "started_at": float(started_at),
        "seconds": max(0.0, round(ended_at - started_at, 6)),
        "worker": task.owner,
        "error": None if error is None else json.loads(error),
    }
    return to_json([*_attempts(task.history), attempt][-MOST_KEPT:])


def _attempts(history: str | None) -> list[Any]:
    """Parse a stored history. A damaged one is dropped, because the outcome must be written."""
    try:
        attempts = json.loads(history or "[]")
    except ValueError:
        return []
    return attempts if isinstance(attempts, list) else []
