"""Courtesies: what BackgroundTasks runs after the response, and forgets if the process dies.

Starlette runs the tasks of a request one after the other; one that raises would skip the rest and
close the connection under the next request. So each of these logs its own errors.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec

import structlog

P = ParamSpec("P")

log = structlog.get_logger(__name__)


def courtesy(function: Callable[P, None]) -> Callable[P, None]:
    """Log what `function` raises, with its traceback, and go on."""

    @functools.wraps(function)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            function(*args, **kwargs)
        except Exception:
            log.exception("background task failed", task=function.__name__)

    return guarded


@courtesy
def write_log(log_file: Path, message: str) -> None:
    """Append a line to the log file, whatever the message contains."""
    line = message if message.isprintable() else message.encode("unicode_escape").decode("ascii")
    log_file.parent.mkdir(parents=True, exist_ok=True)
    with log_file.open("a", encoding="utf-8") as file:
        file.write(line + "\n")


@courtesy
def process_data(data: dict[str, Any]) -> None:
    """Process data; raises ValueError where the data asks for it."""
    if "error" in data:
        raise ValueError("the data asked for an error")
    log.info("data processed", fields=len(data))
