"""The history of a task: its failed attempts, as JSON in the task's row.

An attempt that succeeds adds nothing, because the row has its start, its end and its worker.
"""

import json
from collections.abc import Mapping
from typing import Any

from afterward.task import Task, storable_text, to_json

MOST_KEPT = 20  # of the failed attempts of a task, the newest
# Characters of JSON. The type and the text of an error, at most 1,000 characters, always fit. The
# facts of a TaskError can be of any size, and would be stored 20 times.
MOST_OF_ERROR = 16_000
_UNKNOWN = "Unknown"  # the type of an error that is stored without one


def error_group(error: str | None) -> str | None:
    """Return the group of an error, which is stored as JSON. None for no error.

    Failed tasks are counted and retried by this group.
    """
    return None if error is None else group_of(_described(error))


def group_of(described: Mapping[str, Any]) -> str:
    """Return the type of an error, with its SMTP code if it has one: `PermanentError 550`.

    An index has the groups, so a long one is cut.
    """
    kind, code = described.get("type", _UNKNOWN), described.get("smtp_code")
    return storable_text(f"{kind}" if code is None else f"{kind} {code}")


def error_type(error: str) -> str:
    """Return the type of an error, which is stored as JSON."""
    return str(_described(error).get("type", _UNKNOWN))


def _described(error: str) -> dict[str, Any]:
    """Parse a stored error. A damaged one has no type."""
    try:
        described = json.loads(error)
    except (ValueError, RecursionError):
        return {}
    return described if isinstance(described, dict) else {}


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
        "error": None if error is None else _without_large_facts(error),
    }
    return to_json([*failed_attempts(task.history), attempt][-MOST_KEPT:])


def _without_large_facts(error: str) -> Any:
    described = json.loads(error)
    if len(error) <= MOST_OF_ERROR:
        return described
    return {"type": described["type"], "detail": described["detail"]}


def newest_attempts(history: str | None) -> str:
    """Return a stored history without the attempts before the newest MOST_KEPT."""
    return to_json(failed_attempts(history))


def failed_attempts(history: str | None) -> list[Any]:
    """Parse a stored history, and return its newest MOST_KEPT attempts. A damaged one is dropped.

    It may have some more, because a claim adds a crashed attempt without parsing the history.
    """
    try:
        attempts = json.loads(history or "[]")
    except (ValueError, RecursionError):
        return []
    return attempts[-MOST_KEPT:] if isinstance(attempts, list) else []
