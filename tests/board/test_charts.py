"""The charts, and the counts that they show."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from afterward.events import Event, EventType
from afterward.filter import TaskFilter
from afterward.task import Status, Task
from app.board import activity as activity_module
from app.board.activity import Activity
from app.board.charts import bars, summary
from tests.support.pages import Page

NOW = 1_800_000_000.0  # the beginning of a minute


def test_the_highest_bar_has_the_whole_height_and_a_single_failure_is_seen() -> None:
    svg = bars([0, 1, 1000], title="Failed", status="failed")
    page = Page(f"<html>{svg}</html>")

    assert page.find("path").attributes["d"] == "M80 56v-1h79V56zM160 56v-56h79V56z"
    assert page.find("title").text == "Failed"
    assert page.find("svg").attributes["class"] == "chart failed"
    assert (
        page.find("desc").text == "1,000 now, at most 1,000 a minute, 1,001 in the last 3 minutes"
    )


@given(st.lists(st.integers(0, 10**9), max_size=60))
def test_every_chart_is_well_formed_and_stays_within_its_frame(values: list[int]) -> None:
    page = Page(f"<html>{bars(values, title='<&>')}</html>")

    assert page.find("title").text == "<&>"
    assert page.find("path").attributes["d"].count("M") == sum(value > 0 for value in values)


def test_a_chart_without_values_has_words_too() -> None:
    assert summary([]) == "No values."


# The counts


class Record:
    """In place of an engine: the tasks that are in the database, newest first."""

    def __init__(self, tasks: Sequence[Task] = ()) -> None:
        self.tasks = sorted(tasks, key=lambda task: task.id, reverse=True)
        self.reads = 0

    async def list_tasks(
        self, wanted: TaskFilter, *, after: str | None = None, limit: int
    ) -> list[Task]:
        """Return a page of the tasks, as an engine does."""
        self.reads += 1
        await asyncio.sleep(0)
        assert wanted.since is not None
        return [
            task
            for task in self.tasks
            if task.client == wanted.client
            and task.created_at >= wanted.since
            and (after is None or task.id < after)
        ][:limit]

    async def list_failed(self, client: str, *, limit: int) -> list[Task]:
        """Return the failed tasks, the latest failure first, as an engine does."""
        failed = [
            task for task in self.tasks if task.client == client and task.status is Status.FAILED
        ]
        return sorted(failed, key=lambda task: task.finished_at or 0.0, reverse=True)[:limit]


def a_task(at: float, number: int = 0, **facts: Any) -> Task:
    given = {"id": f"{number:05}", "kind": "send_email", "arguments": "{}"}
    return Task(**given | {"created_at": at, "updated_at": at, "due_at": at} | facts)


def finished(task: Task, status: Status, at: float) -> Task:
    return replace(task, status=status, updated_at=at, finished_at=at)


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> float:
        """Return the time."""
        return self.now


def new_activity(*tasks: Task, **options: Any) -> tuple[Activity, Clock, Record]:
    clock, record = Clock(), Record(tasks)
    return Activity(record, now=clock, **options), clock, record  # type: ignore[arg-type]


@pytest.mark.anyio
async def test_events_are_counted_in_their_minutes() -> None:
    activity, clock, _ = new_activity()
    task = a_task(NOW)
    activity.record(Event(EventType.QUEUED, task))
    activity.record(Event(EventType.STARTED, replace(task, updated_at=NOW + 1)))
    activity.record(Event(EventType.RETRYING, replace(task, updated_at=NOW + 2)))
    activity.record(Event(EventType.FAILED, finished(task, Status.FAILED, NOW + 60)))
    activity.record(Event(EventType.QUEUED, replace(task, updated_at=NOW + 70)))  # again
    activity.record(Event(EventType.SUCCEEDED, finished(task, Status.SUCCEEDED, NOW + 125)))
    clock.now = NOW + 130
    hour = await activity.last_hour("")

    assert len(hour.accepted) == 60
    assert hour.accepted[-3:] == (1, 0, 0)
    assert hour.failed[-3:] == (0, 1, 0)
    assert hour.succeeded[-3:] == (0, 0, 1)


@pytest.mark.anyio
async def test_a_record_of_each_minute_is_read_although_an_hour_lies_in_61_of_them() -> None:
    """After a start at 12:00:30, the tasks since 11:00:30 are read: a minute more than is kept."""
    clock = Clock()
    clock.now = NOW + 30
    times = [NOW - 3565, *(NOW + 15 - 60 * minute for minute in range(60))]
    record = Record([a_task(at, int(at - NOW) + 9999) for at in times])
    hour = await Activity(record, now=clock).last_hour("")  # type: ignore[arg-type]

    assert hour.accepted == (1,) * 60


@pytest.mark.anyio
async def test_a_count_older_than_an_hour_is_forgotten() -> None:
    activity, clock, _ = new_activity()
    for minute in range(100):
        activity.record(Event(EventType.QUEUED, a_task(NOW + 60 * minute)))
    clock.now = NOW + 60 * 99
    assert sum((await activity.last_hour("")).accepted) == 60
    clock.now = NOW + 60 * 1000
    assert sum((await activity.last_hour("")).accepted) == 0


@pytest.mark.anyio
async def test_tasks_before_the_start_are_read_once_and_none_is_counted_twice() -> None:
    before = [
        finished(a_task(NOW - 60, number), Status.SUCCEEDED, NOW - 30) for number in range(250)
    ]
    begun = finished(a_task(NOW - 10, 250), Status.FAILED, NOW + 5)
    since = a_task(NOW + 1, 251)
    activity, clock, record = new_activity(*before, begun, since)
    activity.record(Event(EventType.QUEUED, since))
    activity.record(Event(EventType.FAILED, begun))
    clock.now = NOW + 10
    for _ in range(3):
        hour = await activity.last_hour("")
        assert (sum(hour.accepted), sum(hour.succeeded), sum(hour.failed)) == (252, 250, 1)
    assert record.reads == 3


@pytest.mark.anyio
async def test_after_a_start_a_failure_counts_however_old_its_task_is() -> None:
    """A mail fails for good up to four days after its acceptance."""
    accepted = NOW - 4 * 86400
    tasks = [
        finished(a_task(accepted, 1), Status.FAILED, NOW - 70),
        finished(a_task(accepted, 2), Status.FAILED, NOW - 3700),
        replace(a_task(accepted, 3), status=Status.FAILED),  # a damaged row
        finished(a_task(NOW - 20, 4), Status.FAILED, NOW - 10),
    ]
    activity, _, _ = new_activity(*tasks)
    hour = await activity.last_hour("")

    assert hour.failed[-3:] == (1, 1, 0)
    assert sum(hour.failed) == 2
    assert sum(hour.accepted) == 1


@pytest.mark.anyio
async def test_the_read_after_a_start_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activity_module, "MOST_READ", 300)
    activity, _, record = new_activity(*(a_task(NOW - 5, number) for number in range(1000)))
    assert sum((await activity.last_hour("")).accepted) == 300
    assert record.reads == 3


@pytest.mark.anyio
async def test_of_many_clients_the_silent_ones_are_forgotten_and_read_again() -> None:
    tasks = [a_task(NOW - 5, number, client=f"c{number}") for number in range(10)]
    activity, clock, record = new_activity(*tasks, most_clients=3)
    for number in range(10):
        assert sum((await activity.last_hour(f"c{number}")).accepted) == 1
    assert record.reads == 10
    clock.now = NOW + 10
    later = a_task(NOW + 10, 10, client="c0")
    record.tasks.insert(0, later)
    activity.record(Event(EventType.QUEUED, later))
    assert sum((await activity.last_hour("c0")).accepted) == 2
    assert sum((await activity.last_hour("c9")).accepted) == 1
    assert record.reads == 11


@pytest.mark.anyio
async def test_the_minutes_whose_events_may_be_lost_are_read_again() -> None:
    """The minutes before them stay as they were counted: not all of them can be read again."""
    forgotten = a_task(NOW, 1)
    known, lost = a_task(NOW + 70, 2), finished(a_task(NOW + 75, 3), Status.FAILED, NOW + 80)
    activity, clock, record = new_activity()
    for task in (forgotten, known):
        activity.record(Event(EventType.QUEUED, task))
    clock.now = NOW + 90
    assert (await activity.last_hour("")).accepted[-2:] == (1, 1)

    record.tasks = [lost, known]
    activity.catch_up(NOW + 72)
    activity.record(Event(EventType.FAILED, lost))  # late: it is read from the database
    later = a_task(NOW + 95, 4)
    record.tasks.insert(0, later)
    activity.record(Event(EventType.QUEUED, later))
    clock.now = NOW + 100
    for _ in range(2):
        hour = await activity.last_hour("")
        assert (hour.accepted[-2:], hour.failed[-2:]) == ((1, 3), (0, 1))
    assert record.reads == 2


@pytest.mark.anyio
async def test_a_read_that_runs_when_events_are_lost_is_made_again() -> None:
    before = a_task(NOW - 5, 1)
    activity, clock, record = new_activity(before)
    reading = asyncio.create_task(activity.last_hour(""))
    await asyncio.sleep(0)
    clock.now = NOW + 10
    record.tasks.insert(0, a_task(NOW + 5, 2))
    activity.catch_up(NOW + 4)
    await reading
    assert sum((await activity.last_hour("")).accepted) == 2


@pytest.mark.anyio
async def test_clients_are_counted_apart() -> None:
    activity, _, _ = new_activity(a_task(NOW - 5, 1, client="ada"))
    activity.record(Event(EventType.QUEUED, a_task(NOW, 2, client="eve")))
    counted = {name: sum((await activity.last_hour(name)).accepted) for name in ("ada", "eve", "")}
    assert counted == {"ada": 1, "eve": 1, "": 0}
