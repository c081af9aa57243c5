"""This library, by its public names. The worker runs in the process that adds the tasks."""

import asyncio

import uvloop

from afterward import Afterward, Context
from benchmarks.libraries.contestant import Calls, Starts, run

CONCURRENCY = 100


def measure(location: str, calls: Calls, starts: Starts) -> None:
    """See contestant.run."""

    async def do_nothing(_: Context[None], *, number: int) -> None:
        starts.add(number)

    async def main() -> None:
        afterward = Afterward(f"sqlite:///{location}", tasks=[do_nothing], concurrency=CONCURRENCY)
        async with afterward.running() as queue:

            async def add(number: int) -> None:
                async with queue.transaction() as transaction:
                    transaction.add_task(do_nothing, number=number)

            await calls.make(add)
            await asyncio.to_thread(starts.complete.wait)

    uvloop.run(main())


if __name__ == "__main__":
    run(measure)
