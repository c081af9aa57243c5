"""Courtesies (BackgroundTasks): an error is logged, and the next courtesy still runs."""

import asyncio
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from app.tasks.courtesies import courtesy, process_data, write_log
from app.tasks.log_file import LogFile

pytestmark = pytest.mark.anyio


@courtesy
async def fail(reason: str) -> None:
    """Fail on purpose."""
    raise ValueError(reason)


async def test_an_error_of_a_courtesy_is_logged_once_and_not_raised() -> None:
    with capture_logs() as lines:
        await fail("on purpose")
    (line,) = lines
    assert line == {
        "event": "background task failed",
        "task": "fail",
        "exc_info": True,
        "log_level": "error",
    }


async def test_a_courtesy_keeps_the_name_and_docstring_of_its_function() -> None:
    assert (fail.__name__, fail.__doc__) == ("fail", "Fail on purpose.")


async def test_a_courtesy_can_be_cancelled() -> None:
    @courtesy
    async def wait() -> None:
        await asyncio.Event().wait()

    waiting = asyncio.ensure_future(wait())
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting


@pytest.mark.parametrize(
    ("data", "event", "level"),
    [
        ({}, "data processed", "info"),
        ({"colour": "green"}, "data processed", "info"),
        ({"error": None}, "background task failed", "error"),
    ],
)
async def test_data_is_processed_unless_it_has_the_key_error(
    data: dict[str, object], event: str, level: str
) -> None:
    with capture_logs() as lines:
        await process_data(data)
    assert [(line["event"], line["log_level"]) for line in lines] == [(event, level)]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("message to ada@example.com", "message to ada@example.com"),
        ("Grüße 😀", "Grüße 😀"),
        ("two\nlines\r\n", r"two\nlines\r\n"),
        ("\x1b[2J\u2028", r"\x1b[2J\u2028"),
        ("%s {x}", "%s {x}"),
    ],
)
async def test_a_call_writes_exactly_a_line_with_control_characters_escaped(
    tmp_path: Path, text: str, line: str
) -> None:
    await write_log(LogFile(tmp_path / "deep" / "log.txt"), text)
    assert (tmp_path / "deep" / "log.txt").read_text() == line + "\n"


async def test_lines_are_appended_in_order(tmp_path: Path) -> None:
    log_file = LogFile(tmp_path / "log.txt")
    (tmp_path / "log.txt").write_text("before\n")
    for number in range(3):
        await write_log(log_file, f"line {number}")
    assert (tmp_path / "log.txt").read_text() == "before\nline 0\nline 1\nline 2\n"
