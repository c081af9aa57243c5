"""SAQ on Redis, with its own worker process.

Its sweeper finds the jobs of a crashed worker after their timeout, and runs them again if they have
more than one attempt. So these jobs have two.
"""

from typing import Any

import uvloop
from saq import Queue, Worker  # type: ignore[import-not-found]

from benchmarks.libraries.contestant import CALLERS, Calls, Starts, run_with_worker

CONCURRENCY = 50  # the default, 10, is slower


def add(location: str, calls: Calls) -> None:
    """See contestant.run_with_worker."""

    async def main() -> None:
        queue = Queue.from_url(location, max_concurrent_ops=CALLERS)
        await queue.connect()
        await calls.make(lambda number: queue.enqueue("do_nothing", number=number, retries=2))
        await queue.disconnect()

    uvloop.run(main())


def work(location: str, starts: Starts) -> None:
    """See contestant.run_with_worker."""

    async def do_nothing(_: Any, *, number: int) -> None:
        starts.add(number)

    async def say_ready(_: Any) -> None:
        print("ready", flush=True)

    async def main() -> None:
        queue = Queue.from_url(location, max_concurrent_ops=CONCURRENCY)
        await queue.connect()
        functions = [("do_nothing", do_nothing)]
        await Worker(queue, functions, concurrency=CONCURRENCY, startup=say_ready).start()

    uvloop.run(main())


if __name__ == "__main__":
    run_with_worker(add, work)
