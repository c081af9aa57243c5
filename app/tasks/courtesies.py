"""Courtesies: functions that BackgroundTasks runs after the response. A crash loses them.

Starlette runs the tasks of a request one after the other. If one raises, Starlette skips the rest,
and the server closes the connection, on which the client's next request may be under way. So each
function here logs its own errors.
"""

import functools
from collections.abc import Awaitable, Callable
from typing import Any, ParamSpec

import structlog

from app.tasks.log_file import LogFile

P = ParamSpec("P")

log = structlog.get_logger(__name__)


def courtesy(function: Callable[P, Awaitable[None]]) -> Callable[P, Awaitable[None]]:
    """Decorate a background task: its errors are logged with their traceback, and not raised."""

    @functools.wraps(function)
    async def guarded(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            await function(*args, **kwargs)
        except Exception:
            log.exception("background task failed", task=function.__name__)

    return guarded


@courtesy
async def write_log(log_file: LogFile, message: str) -> None:
    """Append a line to the log file."""
    log_file.append(message)


@courtesy
async def process_data(data: dict[str, Any]) -> None:
    """Process data. Raises ValueError if the data has the key "error"."""
    if "error" in data:
        raise ValueError("the data asked for an error")
    log.info("data processed", fields=len(data))
