"""The batcher: calls that arrive during a write share the next write, each with its own result."""

import asyncio
from collections.abc import Sequence

import pytest

from afterward.engines.postgres.batcher import Batcher
from afterward.errors import QueueUnavailable

pytestmark = pytest.mark.anyio


class Writer:
    """Doubles numbers. A zero makes the whole write fail; a negative number is refused alone."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.away = False

    async def __call__(self, numbers: Sequence[int]) -> list[int | Exception]:
        """Write the numbers, and return a result for each."""
        self.batches.append(list(numbers))
        await asyncio.sleep(0.001)
        if self.away:
            raise QueueUnavailable
        if 0 in numbers:
            raise ZeroDivisionError
        return [ValueError(number) if number < 0 else 2 * number for number in numbers]


async def test_calls_of_one_loop_iteration_share_a_write() -> None:
    write = Batcher(writer := Writer())
    assert await asyncio.gather(*map(write, [1, 2, 3])) == [2, 4, 6]
    assert writer.batches == [[1, 2, 3]]


async def test_calls_that_arrive_during_a_write_share_the_next_one() -> None:
    write = Batcher(writer := Writer())
    first = asyncio.create_task(write(1))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert writer.batches == [[1]]
    assert list(await asyncio.gather(first, write(2), write(3))) == [2, 4, 6]
    assert writer.batches == [[1], [2, 3]]


async def test_a_refused_item_does_not_affect_its_batch() -> None:
    write = Batcher(Writer())
    doubled, refusal = await asyncio.gather(write(1), write(-1), return_exceptions=True)
    assert doubled == 2
    assert isinstance(refusal, ValueError)


async def test_a_batch_that_fails_is_written_item_by_item() -> None:
    write = Batcher(writer := Writer())
    results = await asyncio.gather(*map(write, [1, 0, 3]), return_exceptions=True)
    assert results[::2] == [2, 6]
    assert isinstance(results[1], ZeroDivisionError)
    assert writer.batches == [[1, 0, 3], [1], [0], [3]]


async def test_a_batch_is_not_repeated_while_the_database_is_away() -> None:
    write = Batcher(writer := Writer())
    writer.away = True
    results = await asyncio.gather(*map(write, [1, 2]), return_exceptions=True)
    assert list(map(type, results)) == [QueueUnavailable, QueueUnavailable]
    assert writer.batches == [[1, 2]]


async def test_a_cancelled_caller_does_not_delay_other_callers() -> None:
    """The item of the cancelled caller is written too, because its write has begun."""
    write = Batcher(writer := Writer())
    gone, stays = asyncio.create_task(write(1)), asyncio.create_task(write(2))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    gone.cancel()
    assert await stays == 4
    assert writer.batches == [[1, 2]]


async def test_finish_waits_for_the_write_under_way() -> None:
    write = Batcher(writer := Writer())
    await write.finish()
    last = asyncio.create_task(write(1))
    await asyncio.sleep(0)
    await write.finish()
    assert writer.batches == [[1]]
    assert await last == 2


async def test_a_finish_that_is_cancelled_leaves_no_caller_waiting() -> None:
    """The engine's stop waits for three seconds only, but each caller still gets its result."""
    go_on = asyncio.Event()

    async def write_slowly(items: Sequence[int]) -> Sequence[int]:
        await go_on.wait()
        return items

    batcher = Batcher[int, int](write_slowly)
    caller = asyncio.create_task(batcher(1))
    await asyncio.sleep(0)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(batcher.finish(), 0.01)
    go_on.set()
    assert await asyncio.wait_for(caller, 1) == 1
