"""The timeline of a task: each kind of life, lived on an engine and read from its row."""

import json
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from afterward.engine import Engine
from afterward.history import MOST_KEPT
from afterward.retry import MAX_CRASHES
from afterward.task import Outcome, Status, Task, Writes
from app.board.timeline import TimelineEvent, timeline
from tests.library.support import LEASE, NOW, a_task, claim_one, opened, put, recover, retry

pytestmark = pytest.mark.anyio

REFUSED = {"type": "TemporaryError", "detail": "451 4.7.1 Greylisted", "smtp_code": 451}


class Life:
    """One task on an engine. Each method is a step of its life, at a number of seconds."""

    def __init__(self, engine: Engine, task: Task) -> None:
        self.engine = engine
        self.task = task

    async def start(self, at: float, worker: str = "worker-1") -> None:
        """Let a worker claim it."""
        self.task = await claim_one(self.engine, worker, now=NOW + at)

    async def fail(self, at: float, *, next_at: float | None = None, **error: Any) -> None:
        """End the attempt with an error. Without `next_at` the task fails for good."""
        await self._settle(
            Outcome(
                Status.FAILED if next_at is None else Status.RETRYING,
                due_at=None if next_at is None else NOW + next_at,
                error=json.dumps(REFUSED | error),
            ),
            at,
        )

    async def succeed(self, at: float) -> None:
        """End the attempt without an error."""
        await self._settle(Outcome(Status.SUCCEEDED, result="null"), at)

    async def give_back(self, at: float) -> None:
        """Let its worker stop before the attempt has ended."""
        await self._settle(Outcome(Status.QUEUED, due_at=NOW + at, counts=False), at)

    async def crash(self, at: float) -> None:
        """Let another worker find the expired lease."""
        (self.task,) = await recover(self.engine, "worker-9", now=NOW + at)

    async def cancel(self, at: float) -> None:
        """Cancel it."""
        self.task = await self.engine.cancel(self.task.id, NOW + at)

    async def retry(self, at: float) -> None:
        """Queue it again, as a client does."""
        self.task = await retry(self.engine, self.task.id, NOW + at, Writes())

    async def _settle(self, outcome: Outcome, at: float) -> None:
        settled = await self.engine.settle(self.task, outcome, NOW + at)
        assert settled is not None
        self.task = settled

    def events(self, at: float = 0.0) -> list[TimelineEvent]:
        """Return its timeline."""
        return timeline(self.task, NOW + at)

    def told(self, at: float = 0.0) -> list[tuple[str, float | None, float | None]]:
        """Return the title of each event, the second of its beginning, and its duration."""
        return [
            (event.title, second(event.at), rounded(event.seconds)) for event in self.events(at)
        ]


def second(at: float | None) -> float | None:
    return None if at is None else rounded(at - NOW)


def rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 3)


@pytest.fixture
async def engine(tmp_path: Path) -> AsyncIterator[Engine]:
    async with opened(tmp_path / "queue.db") as engine:
        yield engine


@pytest.fixture
async def life(engine: Engine) -> Life:
    return await lived(engine)


async def lived(engine: Engine, **changes: Any) -> Life:
    task = a_task(**changes)
    await put(engine, task)
    return Life(engine, task)


ACCEPTED = ("Accepted", 0, None)


async def test_a_task_that_waits(life: Life) -> None:
    assert life.told(at=4) == [ACCEPTED, ("Waiting for a worker", None, 4)]


async def test_a_task_that_runs(life: Life) -> None:
    await life.start(2)
    assert life.told(at=5) == [ACCEPTED, ("Attempt 1 is running", 2, 3)]
    running = life.events(at=5)[-1]
    assert (running.worker, running.waited) == ("worker-1", 2)


async def test_a_task_that_succeeds_at_once(life: Life) -> None:
    await life.start(1)
    await life.succeed(1.25)
    assert life.told() == [
        ACCEPTED,
        ("Attempt 1 succeeded", 1, 0.25),
        ("Succeeded", 1.25, None),
    ]
    assert [event.status for event in life.events()] == ["queued", "succeeded", "succeeded"]
    assert life.events()[-1].total == 1.25


async def test_a_task_between_two_attempts(life: Life) -> None:
    await life.start(1)
    await life.fail(1.5, next_at=61.5)
    assert life.told(at=2) == [
        ACCEPTED,
        ("Attempt 1 failed", 1, 0.5),
        ("Attempt 2 is next", 61.5, None),
    ]
    _, failed, next_attempt = life.events(at=2)
    assert failed.error is not None
    assert failed.error.model_dump() == REFUSED
    assert (failed.worker, failed.waited, next_attempt.waited) == ("worker-1", 1, 60)
    assert next_attempt.text == "It has 8 attempts at most."


async def test_a_retry_that_is_due_waits_for_a_worker(life: Life) -> None:
    await life.start(1)
    await life.fail(1.5, next_at=61.5)
    assert life.events(at=61.5)[-1].text == (
        "It has 8 attempts at most. It is due, and waits for a worker."
    )


async def test_a_task_bounded_by_time_tells_when_it_gives_up(engine: Engine) -> None:
    life = await lived(engine, max_attempts=None, gives_up_at=NOW + 1000)
    await life.start(1)
    await life.fail(1.5, next_at=61.5)
    assert life.told(at=2)[2:] == [("Attempt 2 is next", 61.5, None), ("Gives up", 1000, None)]
    assert life.events(at=2)[2].text == ""


async def test_a_task_that_succeeds_after_failures(life: Life) -> None:
    await life.start(1)
    await life.fail(2, next_at=10)
    await life.start(10, "worker-2")
    await life.fail(12, next_at=40)
    await life.start(41, "worker-3")
    await life.succeed(42)
    assert life.told() == [
        ACCEPTED,
        ("Attempt 1 failed", 1, 1),
        ("Attempt 2 failed", 10, 2),
        ("Attempt 3 succeeded", 41, 1),
        ("Succeeded", 42, None),
    ]
    assert [event.waited for event in life.events()] == [None, 1, 8, 29, None]
    assert [event.worker for event in life.events()[1:4]] == ["worker-1", "worker-2", "worker-3"]


async def test_a_crashed_attempt_has_no_duration(life: Life) -> None:
    await life.start(1)
    await life.crash(1 + LEASE)
    assert life.told(at=2 + LEASE) == [
        ACCEPTED,
        ("Attempt 1 crashed", 1, None),
        ("Attempt 2 is next", 1 + LEASE, None),
    ]
    assert life.events(at=2 + LEASE)[-1].text == (
        "It has 8 attempts at most. It is due, and waits for a worker. "
        "After a crash, a worker runs only one such task at a time."
    )


async def test_the_wait_after_a_crash_is_unknown(life: Life) -> None:
    await life.start(1)
    await life.crash(1 + LEASE)
    await life.start(2 + LEASE)
    await life.succeed(3 + LEASE)
    assert [event.waited for event in life.events()] == [None, 1, None, None]


async def test_a_task_that_crashes_each_time_fails(life: Life) -> None:
    for crash in range(MAX_CRASHES):
        await life.start(2 * crash * LEASE)
        await life.crash((2 * crash + 1) * LEASE)
    titles = [event.title for event in life.events()]
    assert titles == ["Accepted", *(f"Attempt {n} crashed" for n in (1, 2, 3)), "Failed for good"]
    assert life.events()[-1].text == "Its worker has crashed 3 times in a row."


@pytest.mark.parametrize(
    ("changes", "error", "reason"),
    [
        ({}, "PermanentError", "The error is permanent: another attempt would fail as well."),
        ({"max_attempts": 1}, "TemporaryError", "It has used all of its attempts: 1."),
        (
            {"max_attempts": None, "gives_up_at": NOW + 2},
            "TemporaryError",
            "The time for its attempts was over.",
        ),
        ({}, "TemporaryError", ""),
    ],
)
async def test_a_task_that_failed_tells_why_it_is_not_tried_again(
    engine: Engine, changes: dict[str, Any], error: str, reason: str
) -> None:
    life = await lived(engine, **changes)
    await life.start(1)
    await life.fail(3, type=error)
    assert life.told() == [ACCEPTED, ("Attempt 1 failed", 1, 2), ("Failed for good", 3, None)]
    assert life.events()[-1].text == reason


async def test_a_task_with_too_many_unexpected_errors(engine: Engine) -> None:
    life = await lived(engine, max_attempts=None, gives_up_at=NOW + 1000)
    await life.start(1)
    await life.fail(3, type="KeyError")
    counted = replace(life.task, errors=8)
    assert timeline(counted, NOW)[-1].text == "It has had too many unexpected errors: 8."


async def test_a_cancelled_task(life: Life) -> None:
    await life.cancel(5)
    assert life.told() == [ACCEPTED, ("Cancelled", 5, None)]


async def test_a_task_that_is_cancelled_between_two_attempts(life: Life) -> None:
    await life.start(1)
    await life.fail(2, next_at=60)
    await life.cancel(5)
    assert life.told() == [ACCEPTED, ("Attempt 1 failed", 1, 1), ("Cancelled", 5, None)]


# Retried on request


async def test_a_retry_on_request_has_its_time_until_the_next_attempt_begins(life: Life) -> None:
    await life.start(1)
    await life.fail(2)
    await life.retry(100)
    before = [ACCEPTED, ("Attempt 1 failed", 1, 1)]
    assert life.told(at=103) == [
        *before,
        ("Retried on request", 100, None),
        ("Waiting for a worker", None, 3),
    ]
    await life.start(104)
    assert life.told(at=105) == [
        *before,
        ("Retried on request", None, None),
        ("Attempt 1 is running", 104, 1),
    ]
    assert life.events(at=105)[-1].waited is None
    await life.succeed(106)
    assert life.told()[2:] == [
        ("Retried on request", None, None),
        ("Attempt 1 succeeded", 104, 2),
        ("Succeeded", 106, None),
    ]


async def test_the_numbers_of_the_attempts_tell_of_an_earlier_retry_on_request(life: Life) -> None:
    await life.start(1)
    await life.fail(2, next_at=3)
    await life.start(3)
    await life.fail(4)
    await life.retry(100)
    await life.start(101)
    await life.fail(102, next_at=110)
    assert [event.title for event in life.events()] == [
        "Accepted",
        "Attempt 1 failed",
        "Attempt 2 failed",
        "Retried on request",
        "Attempt 1 failed",
        "Attempt 2 is next",
    ]


async def test_a_cancelled_task_that_is_retried(life: Life) -> None:
    await life.cancel(5)
    await life.retry(7)
    assert life.told(at=8) == [
        ACCEPTED,
        ("Retried on request", 7, None),
        ("Waiting for a worker", None, 1),
    ]


async def test_a_task_that_is_retried_and_then_cancelled(life: Life) -> None:
    await life.start(1)
    await life.fail(2)
    await life.retry(5)
    await life.cancel(9)
    assert life.told()[2:] == [("Retried on request", 5, None), ("Cancelled", 9, None)]


# Given back


async def test_a_worker_that_stops_gives_the_task_back(life: Life) -> None:
    await life.start(1)
    await life.give_back(6)
    assert life.told(at=8) == [
        ACCEPTED,
        ("Given back", 6, None),
        ("Waiting for a worker", None, 2),
    ]
    await life.start(10)
    await life.succeed(11)
    assert life.told() == [
        ACCEPTED,
        ("Given back", None, None),
        ("Attempt 1 succeeded", 10, 1),
        ("Succeeded", 11, None),
    ]
    assert life.events()[2].waited is None, "it has not waited all the time"


async def test_a_task_that_was_given_back_twice_after_a_retry_on_request(life: Life) -> None:
    await life.start(1)
    await life.fail(2)
    await life.retry(3)
    for at in (4, 6):
        await life.start(at)
        await life.give_back(at + 1)
    assert life.told(at=8)[2:] == [
        ("Retried on request", None, None),
        ("Given back 2 times", 7, None),
        ("Waiting for a worker", None, 1),
    ]


# What the row does not keep


async def fail_often(life: Life, times: int, *, start: int = 0) -> None:
    for attempt in range(start, start + times):
        await life.start(2 * attempt)
        await life.fail(2 * attempt + 1, next_at=2 * attempt + 2)


async def test_twenty_failed_attempts_are_all_there(engine: Engine) -> None:
    life = await lived(engine, max_attempts=100)
    await fail_often(life, MOST_KEPT)
    titles = [event.title for event in life.events()]
    assert titles[:2] == ["Accepted", "Attempt 1 failed"]
    assert len(titles) == 1 + MOST_KEPT + 1


async def test_the_oldest_of_more_failed_attempts_are_gone(engine: Engine) -> None:
    life = await lived(engine, max_attempts=100)
    await fail_often(life, MOST_KEPT + 5)
    titles = [event.title for event in life.events()]
    assert titles[:3] == ["Accepted", "Earlier attempts", "Attempt 6 failed"]
    assert len(titles) == 2 + MOST_KEPT + 1
    assert life.events()[1].text == (
        "A task keeps its newest 20 failed attempts. Those before attempt 6 are gone."
    )


async def test_attempts_before_a_retry_on_request_may_be_gone(engine: Engine) -> None:
    life = await lived(engine, max_attempts=100)
    await life.start(1)
    await life.fail(2)
    await life.retry(3)
    await fail_often(life, MOST_KEPT, start=4)
    titles = [event.title for event in life.events()]
    assert titles[:3] == ["Accepted", "Earlier attempts", "Attempt 1 failed"]
    assert "before a retry on request" in life.events()[1].text


async def test_a_history_with_more_attempts_is_shown_as_the_api_shows_it(engine: Engine) -> None:
    """A claim adds a crashed attempt without removing the oldest ones."""
    life = await lived(engine, max_attempts=100)
    await fail_often(life, MOST_KEPT)
    attempts = json.loads(life.task.history or "")
    longer = [*attempts, *({**attempts[-1], "attempt": n} for n in (21, 22))]
    task = replace(life.task, attempts=22, claims=22, history=json.dumps(longer))
    titles = [event.title for event in timeline(task, NOW)]
    assert titles[:3] == ["Accepted", "Earlier attempts", "Attempt 3 failed"]
    assert len(titles) == 2 + MOST_KEPT + 1


@pytest.mark.parametrize(
    "history", ["no JSON", "[1]", '[{"attempt": 1}]', "{}", "1", "[" * 100_000], ids=lambda h: h[:9]
)
async def test_a_damaged_history_hides_neither_the_task_nor_its_error(
    life: Life, history: str
) -> None:
    await life.start(1)
    await life.fail(2)
    events = timeline(replace(life.task, history=history), NOW)
    assert [event.title for event in events] == ["Accepted", "Failed attempts", "Failed for good"]
    assert events[1].error is not None
    assert events[1].error.model_dump() == REFUSED
    assert events[1].text.endswith("The latest error was:")
    without_error = timeline(replace(life.task, history=history, error=None), NOW)[1]
    assert (without_error.error, without_error.text[-5:]) == (None, "read.")


async def test_a_damaged_row_is_shown(life: Life) -> None:
    await life.start(1)
    await life.succeed(2)
    damaged = replace(life.task, started_at=None, finished_at=None)
    assert timeline(damaged, NOW)[0].title == "Accepted"


# Clocks


async def test_a_clock_that_was_set_back_is_told_of(life: Life) -> None:
    await life.start(100)
    await life.fail(101, next_at=90)
    await life.start(-50)
    await life.succeed(-49)
    events = life.events()
    assert [event.clock_was_set_back for event in events] == [False, False, True, False]
    assert events[-1].total == 0


async def test_clocks_that_differ_a_little_are_not(life: Life) -> None:
    await life.start(-0.5)
    assert [event.clock_was_set_back for event in life.events()] == [False, False]


async def test_a_duration_is_never_negative(life: Life) -> None:
    await life.start(5)
    assert life.told(at=1)[-1] == ("Attempt 1 is running", 5, 0)
    assert timeline(a_task(at=NOW + 5), NOW)[-1].seconds == 0
