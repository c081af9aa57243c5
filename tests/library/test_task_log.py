"""Log lines about tasks: a failure is logged without any further setting, a deferral once."""

import asyncio
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from afterward import Afterward, Context, Event, EventType, PermanentError, TemporaryError
from afterward.call import error_as_json
from afterward.errors import ServiceUnavailable
from afterward.task import Status
from afterward.task_log import SUM_UP_SECONDS, TaskLog
from tests.library.support import a_task

BUSY = TemporaryError("mailbox busy", smtp_code=450)


@pytest.fixture(autouse=True)
def every_level() -> Iterator[None]:
    """Let lines of every level through, as LOG_LEVEL=DEBUG does."""
    level = logging.root.level
    logging.root.setLevel(logging.DEBUG)
    yield
    logging.root.setLevel(level)


@pytest.mark.anyio
async def test_a_failure_is_logged_without_any_further_setting(tmp_path: Path) -> None:
    async def refuse(context: Context[None]) -> None:
        raise PermanentError("no such mailbox", smtp_code=550)

    async def stumble(context: Context[None]) -> None:
        raise OSError("a bug")

    afterward: Afterward[None] = Afterward(
        f"sqlite:///{tmp_path}/queue.db", tasks=[refuse, stumble]
    )
    ended = asyncio.Event()

    def watch(event: Event) -> None:
        if event.type is EventType.RETRYING:
            ended.set()

    afterward.queue.events.subscribe(watch)
    with capture_logs() as lines:
        async with afterward.running() as queue:
            async with queue.transaction("request-1", "ada") as transaction:
                task = transaction.add_task(refuse)
                transaction.add_task(stumble)
            await asyncio.wait_for(ended.wait(), 10)
    (failed,) = [line for line in lines if line["event"] == "task failed"]
    assert (failed["log_level"], failed["task_id"]) == ("error", task.id)
    assert (failed["request_id"], failed["client"]) == ("request-1", "ada")
    assert failed["error"] == {
        "type": "PermanentError",
        "detail": "no such mailbox",
        "smtp_code": 550,
    }
    assert "exc_info" not in failed
    (retrying,) = [line for line in lines if line["event"] == "task retrying"]
    assert isinstance(retrying["exc_info"], OSError)
    assert 0 <= retrying["next_attempt_in"] <= 1


class Deferrals:
    """A task log with a clock that a test sets."""

    def __init__(self) -> None:
        self.now = 0.0
        self._task_log = TaskLog(lambda: self.now)

    def defer(self, error: TemporaryError = BUSY) -> list[Any]:
        """Defer one task; returns the lines above DEBUG."""
        task = a_task(status=Status.RETRYING, attempts=1, error=error_as_json(error))
        with capture_logs() as lines:
            self._task_log.write(Event(EventType.RETRYING, task, 0.1, error))
        return [line["event"] for line in lines if line["log_level"] != "debug"]


def test_deferrals_of_one_cause_are_one_line_a_minute() -> None:
    deferrals = Deferrals()
    assert deferrals.defer() == ["task retrying"]
    assert deferrals.defer() == []
    assert deferrals.defer(TemporaryError("greylisted", smtp_code=451)) == ["task retrying"]
    deferrals.now += SUM_UP_SECONDS
    assert deferrals.defer() == ["tasks deferred"]  # the second one; the third is counted
    deferrals.now += 2 * SUM_UP_SECONDS
    assert deferrals.defer() == ["tasks deferred"]


class Full(TemporaryError):
    """An error with an __init__ of its own, which does not call that of its base class."""

    def __init__(self, quota: int) -> None:
        self.quota = quota


class Odd(TemporaryError):
    """An error whose facts are none."""

    facts = 7  # type: ignore[assignment]

    def __init__(self) -> None:
        """Set nothing."""


@pytest.mark.parametrize("error", [Full(7), Odd()], ids=repr)
def test_the_deferrals_of_an_error_without_facts_are_one_line(error: TemporaryError) -> None:
    deferrals = Deferrals()
    assert deferrals.defer(error) == ["task retrying"]
    assert deferrals.defer(error) == []


def test_an_error_with_an_init_of_its_own_has_no_facts() -> None:
    assert Full(7).facts == {}


def test_a_cause_is_forgotten_after_a_quiet_minute() -> None:
    deferrals = Deferrals()
    assert deferrals.defer() == ["task retrying"]
    deferrals.now += SUM_UP_SECONDS
    assert deferrals.defer() == ["task retrying"]


def test_an_outage_is_not_logged_for_each_task() -> None:
    """The worker itself logs the outage, once."""
    assert Deferrals().defer(ServiceUnavailable("connection refused")) == []


def test_a_line_below_the_level_is_not_written() -> None:
    logging.root.setLevel(logging.WARNING)
    with capture_logs() as lines:
        TaskLog().write(Event(EventType.SUCCEEDED, a_task(status=Status.SUCCEEDED)))
    assert lines == []
