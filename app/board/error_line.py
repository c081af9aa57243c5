"""The stored error of a task as one line."""

from app.api.schemas import TaskFailure

MOST_SHOWN = 300  # characters of the line


def error_line(error: str | None) -> str:
    """Return a stored error as one line: "PermanentError: 550 5.1.1 User unknown"."""
    if error is None:
        return ""
    failure = TaskFailure.of(error)
    line = " ".join(f"{failure.type}: {failure.detail}".split())
    return line if len(line) <= MOST_SHOWN else line[:MOST_SHOWN] + "…"
