"""The counts on the pages of tasks, which all viewers share."""

import asyncio
import itertools
from typing import Any

import pytest
from starlette.datastructures import QueryParams

from afterward.queue import Queue
from app.api import shared_read
from app.api.shared_read import SharedReads
from app.board.counts import Counts, Matches
from app.board.task_search import TaskSearch
from tests.library.support import NOW, Clock

pytestmark = pytest.mark.anyio


class CountingEngine:
    """An engine that notes each count, and finds seven tasks."""

    def __init__(self) -> None:
        self.counted: list[Any] = []

    async def count_tasks(self, wanted: Any) -> int:
        """Count the tasks that match."""
        self.counted.append(wanted)
        return 7


@pytest.fixture
def engine() -> CountingEngine:
    return CountingEngine()


@pytest.fixture
def counts(engine: CountingEngine, clock: Clock) -> Counts:
    queue: Any = Queue.__new__(Queue)
    queue.engine, queue.now = engine, clock
    return Counts(queue, SharedReads())


@pytest.fixture
def clock() -> Clock:
    return Clock()


def search(query: str) -> TaskSearch:
    return TaskSearch.read(QueryParams(query), NOW)


async def test_viewers_of_the_same_search_share_its_count(
    counts: Counts, engine: CountingEngine
) -> None:
    found = await asyncio.gather(*(counts.matches(search("kind=a"), "ada") for _ in range(20)))
    assert set(found) == {Matches(retry=7, cancel=7)}
    assert len(engine.counted) == 2, "one for each action"


async def test_clients_and_searches_have_their_own_counts(
    counts: Counts, engine: CountingEngine
) -> None:
    for query, client in (("kind=a", "ada"), ("kind=b", "ada"), ("kind=a", "eve")):
        await counts.matches(search(query), client)
    asked = [(wanted.kind, wanted.client) for wanted in engine.counted[::2]]
    assert asked == [("a", "ada"), ("b", "ada"), ("a", "eve")]


async def test_a_period_moves_with_the_clock(
    counts: Counts, engine: CountingEngine, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_read, "_now", itertools.count(0, 100).__next__)
    first = search("period=1h")
    await counts.matches(first, "")
    clock.now += 600
    await counts.matches(first, "")
    since = [round(wanted.since) for wanted in engine.counted[::2]]
    assert since == [NOW - 3600, NOW - 3000]


async def test_the_search_that_was_not_used_for_longest_is_forgotten(
    counts: Counts, engine: CountingEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_read, "MOST_READS", 2)
    for kind in ("a", "b", "a", "c", "a", "b"):
        await counts.matches(search(f"kind={kind}"), "")
    assert [wanted.kind for wanted in engine.counted[::2]] == ["a", "b", "c", "b"]
