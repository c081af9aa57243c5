"""A task as lines of text: in a list, on its own with the history of its attempts, in a pipe.

The JSON comes from a service that may be newer or older than this program, or no such service at
all. So a missing or strange field never raises an error here: it is shown as it is.
"""

import contextlib
import json
import math
from collections.abc import Generator, Iterable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

from rich.cells import cell_len

from afterward.history import MOST_KEPT, group_of
from app.terminal.output import Json, Output, printable

STYLES = {
    "queued": "cyan",
    "running": "blue",
    "retrying": "yellow",
    "succeeded": "green",
    "failed": "red",
    "cancelled": "dim",
}
_FAINT = "dim"
_UNITS = ((86_400, "d"), (3_600, "h"), (60, "m"), (1, "s"))

# The columns of a list on a terminal, with their widths. The last one may be longer. A terminal of
# less than _WIDE characters has no room for the value that people search for, so it gets only the
# first columns, and the others in a line below.
_COLUMNS = (("ID", 36), ("STATUS", 9), ("AGE", 4), ("KIND", 11), ("ABOUT", 5))
_FIRST_COLUMNS = 3
_WIDE = 100

_TIME_WIDTH = 23  # characters of a time, as `time_text` returns it
_RETRIED = "retried on request: the attempts are counted from 1 again"
_GIVEN_BACK = "given back: its worker stopped, so this attempt does not count"


# Fields


def field(task: Json, name: str) -> str:
    """Return a field as a text that can be printed; empty if there is no value."""
    value = task.get(name)
    return "" if value is None else printable(value)


def error_text(error: Any) -> str:
    """Return an error in one line: `PermanentError 550: no such mailbox`. Empty for no error.

    The code is left out if the detail begins with it, as the reply of an SMTP server does.
    """
    if not isinstance(error, dict):
        return "" if error is None else printable(error)
    detail, code = field(error, "detail"), field(error, "smtp_code")
    has_code = code and detail.startswith(code)
    return f"{field(error, 'type') if has_code else printable(group_of(error))}: {detail}"


def _status(task: Json) -> tuple[str, str]:
    """Return the status, and the style in which it is shown."""
    status = field(task, "status")
    return status, STYLES.get(status, "")


# Numbers


def _number(value: object) -> float | None:
    """Return a finite number. None for any other value, and for one that is too large."""
    with contextlib.suppress(OverflowError):
        if isinstance(value, int | float) and math.isfinite(value):
            return float(value)
    return None


def part(progress: object) -> float | None:
    """Return the progress of a task, a number from 0 to 1. None for any other value."""
    done = _number(progress)
    return None if done is None or not 0 <= done <= 1 else done


# Times


def _parsed(text: object) -> datetime | None:
    """Return a time in UTC. None for any other text."""
    try:
        moment = datetime.fromisoformat(str(text))
        return moment.astimezone(UTC) if moment.tzinfo else moment.replace(tzinfo=UTC)
    except (ValueError, OverflowError):  # OverflowError: in UTC the year is 0 or 10000
        return None


def time_text(text: object) -> str:
    """Return a time as `2026-11-28 14:03:22 UTC`. Empty for no time."""
    moment = _parsed(text)
    if moment is None:
        return "" if text is None else printable(text)
    return f"{moment:%Y-%m-%d %H:%M:%S} UTC"


def _since(text: object) -> timedelta | None:
    moment = _parsed(text)
    return None if moment is None else datetime.now(UTC) - moment


def short(span: timedelta) -> str:
    """Return a time span in its largest unit: `4m` for 250 seconds, `0s` for a negative one."""
    seconds = max(0, int(span.total_seconds()))
    return next((f"{seconds // size}{unit}" for size, unit in _UNITS if seconds >= size), "0s")


def _age(task: Json) -> str:
    span = _since(task.get("created_at"))
    return "?" if span is None else short(span)


# Lists


def write_header(output: Output) -> None:
    """Print the names of the columns, on a terminal."""
    if output.is_terminal and not output.as_json:
        names = [_padded(name, width) for name, width in _COLUMNS]
        output.line((" ".join(names[: _columns(output)]), "bold"), cut=True)


def write_task(output: Output, task: Json) -> None:
    """Print one task of a list. On a terminal, its error is in a line below it."""
    if not output.is_terminal or output.as_json:
        _write_for_programs(output, task, "created_at")
        return
    status, style = _status(task)
    cells = (field(task, "id"), status, _age(task), field(task, "kind"), field(task, "about"))
    padded = [_padded(cell, width) for cell, (_, width) in zip(cells, _COLUMNS, strict=True)]
    columns = _columns(output)
    output.line(f"{padded[0]} ", (padded[1], style), " ", " ".join(padded[2:columns]), cut=True)
    if columns < len(cells):
        output.line("  ", " ".join(cells[columns:]), cut=True)
    if error := error_text(task.get("error")):
        output.line((f"  attempt {field(task, 'attempts')}: {error}", _FAINT), cut=True)


def _columns(output: Output) -> int:
    """Return the number of columns that fit into a line of this terminal."""
    return len(_COLUMNS) if output.console.width >= _WIDE else _FIRST_COLUMNS


def write_change(output: Output, task: Json) -> None:
    """Print a task after a change, in one line."""
    if not output.is_terminal or output.as_json:
        _write_for_programs(output, task, "updated_at")
        return
    status, style = _status(task)
    moment = _parsed(task.get("updated_at"))
    clock = "" if moment is None else f"{moment:%H:%M:%SZ} "
    facts = (_percent(task.get("progress")), field(task, "kind"), field(task, "about"))
    words = " ".join(filter(None, (*facts, error_text(task.get("error")))))
    output.line((clock, _FAINT), f"{field(task, 'id')} ", (_padded(status, 9), style), f" {words}")


def _write_for_programs(output: Output, task: Json, time: str) -> None:
    """Print a task as JSON, or as columns. `time` is the field of their time.

    The columns have no tab and no line break in them, because `printable` has escaped both.
    """
    if output.as_json:
        output.json(task)
        return
    values = [field(task, name) for name in ("id", "status", "kind", "about", "attempts", time)]
    output.columns([*values, error_text(task.get("error"))])


def _padded(text: str, width: int) -> str:
    """Return a text that fills its column. A longer text is not cut."""
    return text + " " * (width - cell_len(text))


# One task


def write_details(output: Output, task: Json) -> None:
    """Print all fields of a task, and its attempts in the order of time."""
    status, style = _status(task)
    about = f" for {field(task, 'about')}" if task.get("about") else ""
    output.line((f"{field(task, 'kind')}{about}: ", "bold"), (status, f"bold {style}".strip()))
    for name, value in _fields(task):
        if value:
            output.item(f"{name:<8}", value)
    output.line("")
    write_timeline(output, task)


def write_timeline(output: Output, task: Json, *, indent: int = 2) -> None:
    """Print the events in the life of a task, in the order in which they happened."""
    for moment, event, style in _timeline(task):
        output.item(f"{time_text(moment):<{_TIME_WIDTH}}", event, style, indent=indent)


def _fields(task: Json) -> Iterator[tuple[str, str]]:
    yield "id", field(task, "id")
    yield "attempts", _attempts(task)
    yield "progress", _percent(task.get("progress"))
    yield "batch", field(task, "batch_id")
    yield "request", field(task, "request_id")
    yield "worker", field(task, "worker")
    yield "error", error_text(task.get("error"))
    if task.get("result") is not None:
        yield "result", printable(json.dumps(task["result"], ensure_ascii=False))


def _attempts(task: Json) -> str:
    """Return the attempts and their bound: a number, or a time."""
    attempts = field(task, "attempts")
    if task.get("max_attempts") is not None:
        return f"{attempts} of at most {field(task, 'max_attempts')}"
    if task.get("gives_up_at") is not None:
        return f"{attempts}, until {time_text(task['gives_up_at'])}"
    return attempts


def _percent(progress: object) -> str:
    done = part(progress)
    return "" if done is None else f"{done:.0%}"


# The time of an event, or None if it is unknown; its text; and its style.
_Event = tuple[object, str, str]


def _timeline(task: Json) -> Iterator[_Event]:
    """Yield the events in the life of a task. A client has retried this mail after its failure.

    14:00:00  accepted
    14:00:01  attempt 1 crashed: WorkerDied: the process died while it ran this task
    14:00:35  attempt 2 failed after 0.25 s: PermanentError: 550 no such mailbox
              retried on request: the attempts are counted from 1 again
    15:00:00  attempt 1 succeeded
    """
    yield task.get("created_at"), "accepted", ""
    history = task.get("history")
    attempts = filter(_is_attempt, history if isinstance(history, list) else [])
    last = yield from _failed_attempts(attempts)
    yield from _since_last_failure(task, last)
    yield from _now(task)


def _is_attempt(item: object) -> bool:
    return isinstance(item, dict) and isinstance(item.get("attempt"), int)


def _failed_attempts(attempts: Iterable[Json]) -> Generator[_Event, None, int]:
    """Yield the failed attempts, and the retries between them. Return the last one's number.

    A retry on request has no event of its own in the history, but the numbers begin at 1 again. If
    the first number is higher, the task does not keep the attempts before.
    """
    before = 0
    for attempt in attempts:
        if not before and attempt["attempt"] > 1:
            yield None, _not_kept(attempt["attempt"] - 1), ""
        if attempt["attempt"] <= before:
            yield None, _RETRIED, ""
        before = attempt["attempt"]
        yield attempt.get("started_at"), _failed_attempt(attempt), "yellow"
    return before


def _not_kept(last: int) -> str:
    attempts = "attempt 1 is" if last == 1 else f"attempts 1 to {last} are"
    return f"{attempts} not kept: a task keeps its newest {MOST_KEPT} failed attempts"


def _failed_attempt(attempt: Json) -> str:
    worker = f" (worker {field(attempt, 'worker')})" if attempt.get("worker") else ""
    end = f"attempt {attempt['attempt']} {_end(attempt.get('seconds'))}"
    return f"{end}: {error_text(attempt.get('error'))}{worker}"


def _end(seconds: object) -> str:
    """Return how an attempt ended. Its length is unknown after a crash."""
    if seconds is None:
        return "crashed"
    known = _number(seconds)
    return "failed" if known is None else f"failed after {known:.2f} s"


def _since_last_failure(task: Json, last: int) -> Iterator[_Event]:
    """Yield what happened after the last failed attempt, whose number is `last`; 0 for none.

    A retry on request sets the number of attempts to 0. A worker that stops gives its running tasks
    back: such a task is queued, but has a start.
    """
    status, attempts = task.get("status"), task.get("attempts")
    is_queued, has_started = status == "queued", task.get("started_at") is not None
    # The latest attempt is not in the history while it runs, and if it has succeeded.
    expected = last + (status in ("running", "succeeded"))
    if isinstance(attempts, int) and attempts < expected:
        is_latest = is_queued and not has_started
        yield task.get("updated_at") if is_latest else None, _RETRIED, ""
    if is_queued and has_started:
        yield task.get("updated_at"), _GIVEN_BACK, ""


def _now(task: Json) -> Iterator[_Event]:
    """Yield the last event: the end of the task, its running attempt, or its next attempt."""
    status, style = _status(task)
    attempt = f"attempt {field(task, 'attempts')}"
    match status:
        case "running":
            yield task.get("started_at"), f"{attempt} runs on {field(task, 'worker')}", style
        case "retrying":
            yield (
                task.get("next_attempt_at"),
                f"next attempt{_in(task.get('next_attempt_at'))}",
                style,
            )
        case "succeeded":
            yield task.get("finished_at"), f"{attempt} succeeded", style
        case "failed" | "cancelled":
            yield task.get("finished_at"), status, style


def _in(moment: object) -> str:
    """Return the time until a moment, if it is still to come."""
    span = _since(moment)
    return "" if span is None or span > timedelta(0) else f", in {short(-span)}"
