"""Courtesies: what BackgroundTasks runs after the response, and forgets if the process dies.

Starlette runs the tasks of a request one after the other; one that raises would skip the rest and
close the connection under the next request. So each of these logs its own errors.
"""

import functools
from collections.abc import Awaitable, Callable
from typing import Any, ParamSpec

import structlog

from app.tasks.log_file import LogFile

P = ParamSpec("P")

log = structlog.get_logger(__name__)


def courtesy(function: Callable[P, Awaitable[None]]) -> Callable[P, Awaitable[None]]:
    """Log what `function` raises, with its traceback, and go on."""

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
    """Process data; raises ValueError where the data asks for it."""
    if "error" in data:
        raise ValueError("the data asked for an error")
    log.info("data processed", fields=len(data))
