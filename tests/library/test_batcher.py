"""Calls that come in while one is under way share the next, and each gets its own answer."""

import asyncio
from collections.abc import Sequence

import pytest

from afterward.engines.postgres.batcher import Batcher
from afterward.errors import QueueUnavailable

pytestmark = pytest.mark.anyio


class Writer:
    """Doubles numbers. A zero cannot be written, and what is negative is refused."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.away = False

    async def __call__(self, numbers: Sequence[int]) -> list[int | Exception]:
        """Write them."""
        self.batches.append(list(numbers))
        await asyncio.sleep(0.001)
        if self.away:
            raise QueueUnavailable
        if 0 in numbers:
            raise ZeroDivisionError
        return [ValueError(number) if number < 0 else 2 * number for number in numbers]


async def test_those_who_come_together_are_written_together() -> None:
    write = Batcher(writer := Writer())
    assert await asyncio.gather(*map(write, [1, 2, 3])) == [2, 4, 6]
    assert writer.batches == [[1, 2, 3]]


async def test_those_who_come_meanwhile_share_the_next() -> None:
    write = Batcher(writer := Writer())
    first = asyncio.create_task(write(1))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert writer.batches == [[1]]
    assert list(await asyncio.gather(first, write(2), write(3))) == [2, 4, 6]
    assert writer.batches == [[1], [2, 3]]


async def test_a_refusal_is_for_the_one_it_is_about() -> None:
    write = Batcher(Writer())
    doubled, refusal = await asyncio.gather(write(1), write(-1), return_exceptions=True)
    assert doubled == 2
    assert isinstance(refusal, ValueError)


async def test_one_that_cannot_be_written_spoils_none_of_the_others() -> None:
    write = Batcher(writer := Writer())
    results = await asyncio.gather(*map(write, [1, 0, 3]), return_exceptions=True)
    assert results[::2] == [2, 6]
    assert isinstance(results[1], ZeroDivisionError)
    assert writer.batches == [[1, 0, 3], [1], [0], [3]]


async def test_a_database_that_is_away_is_asked_once() -> None:
    write = Batcher(writer := Writer())
    writer.away = True
    results = await asyncio.gather(*map(write, [1, 2]), return_exceptions=True)
    assert list(map(type, results)) == [QueueUnavailable, QueueUnavailable]
    assert writer.batches == [[1, 2]]


async def test_who_goes_away_holds_up_nobody() -> None:
    """What was begun for him is done all the same."""
    write = Batcher(writer := Writer())
    gone, stays = asyncio.create_task(write(1)), asyncio.create_task(write(2))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    gone.cancel()
    assert await stays == 4
    assert writer.batches == [[1, 2]]


async def test_the_end_waits_for_what_was_begun() -> None:
    write = Batcher(writer := Writer())
    await write.finish()
    last = asyncio.create_task(write(1))
    await asyncio.sleep(0)
    await write.finish()
    assert writer.batches == [[1]]
    assert await last == 2
