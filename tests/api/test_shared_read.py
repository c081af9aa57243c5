"""Shared reads: callers share a call, and its result for a while."""

import asyncio

import pytest

from app.api import shared_read
from app.api.shared_read import SharedRead, SharedReads

pytestmark = pytest.mark.anyio


class Reads:
    """A read that waits for the test, and returns how often it was called."""

    def __init__(self) -> None:
        self.begun = 0
        self.may_end = asyncio.Event()
        self.may_end.set()

    async def __call__(self, *_: str) -> int:
        """Read."""
        self.begun += 1
        number = self.begun
        await self.may_end.wait()
        return number


@pytest.fixture
def reads() -> Reads:
    return Reads()


async def test_callers_share_a_read_and_a_cancelled_caller_does_not_stop_it(reads: Reads) -> None:
    shared = SharedRead(reads)
    reads.may_end.clear()
    callers = [asyncio.create_task(shared.get()) for _ in range(5)]
    await asyncio.sleep(0)
    callers[0].cancel()
    reads.may_end.set()
    assert await asyncio.gather(*callers[1:]) == [1] * 4
    assert callers[0].cancelled() or callers[0].cancelling()
    assert await shared.get() == 1


async def test_a_newer_result_is_not_that_of_a_read_that_runs_already(reads: Reads) -> None:
    """That read may have missed what has just changed."""
    shared = SharedRead(reads, reused=0.01, longest=0.01)
    reads.may_end.clear()
    older = asyncio.create_task(shared.get())
    await asyncio.sleep(0)
    newer = asyncio.create_task(shared.get_newer())
    await asyncio.sleep(0)
    reads.may_end.set()
    assert (await older, await newer) == (1, 2)


async def test_a_newer_result_waits_for_the_pause(reads: Reads) -> None:
    shared = SharedRead(reads, reused=0.1)
    assert await shared.get_newer() == 1
    newer = asyncio.create_task(shared.get_newer())
    await asyncio.sleep(0.05)
    assert reads.begun == 1
    assert await newer == 2


async def test_an_error_is_raised_to_all_that_share_the_call_and_the_next_tries_again() -> None:
    errors = [LookupError("away")]

    async def read() -> str:
        await asyncio.sleep(0)
        if errors:
            raise errors.pop()
        return "back"

    shared = SharedRead(read)
    results = await asyncio.gather(shared.get(), shared.get(), return_exceptions=True)
    assert [type(result) for result in results] == [LookupError] * 2
    assert await shared.get_newer() == "back"


async def test_a_slow_read_is_reused_for_longer_but_not_for_too_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = [0.0]
    monkeypatch.setattr(shared_read, "_now", lambda: clock[0])
    took = [0.5, 5.0, 0.0]

    async def read() -> float:
        seconds = took.pop(0)
        clock[0] += seconds
        return seconds

    shared = SharedRead(read)
    for at, result in ((0, 0.5), (5.4, 0.5), (5.6, 5.0), (40.5, 5.0), (40.7, 0.0)):
        clock[0] = at
        assert await shared.get() == result


async def test_each_function_has_a_read_for_its_arguments(reads: Reads) -> None:
    shared, others = SharedReads(), Reads()
    assert await shared.of(reads, "ada", "a b").get() == 1
    assert await shared.of(reads, "ada a", "b").get() == 2
    assert await shared.of(others, "ada", "a b").get() == 1
    assert await shared.of(reads, "ada", "a b").get() == 1
