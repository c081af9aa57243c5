"""Taskiq on a Redis stream, with its own worker process, and without a store for results.

Another worker takes the tasks of a crashed worker over after ten minutes (`idle_timeout`).
"""

from typing import Any

import uvloop
from taskiq.api import run_receiver_task  # type: ignore[import-not-found]
from taskiq_redis import RedisStreamBroker  # type: ignore[import-not-found]

from benchmarks.libraries.contestant import CALLERS, Calls, Starts, run_with_worker

CONCURRENCY = 100  # the default
PREFETCHED = 100  # the default, 0, is slower


def add(location: str, calls: Calls) -> None:
    """See contestant.run_with_worker."""

    async def main() -> None:
        broker, task = _broker_and_task(location, Starts(0))
        await broker.startup()
        await calls.make(task.kiq)
        await broker.shutdown()

    uvloop.run(main())


def work(location: str, starts: Starts) -> None:
    """See contestant.run_with_worker."""

    async def main() -> None:
        broker, _ = _broker_and_task(location, starts)
        await broker.startup()
        print("ready", flush=True)
        await run_receiver_task(broker, max_async_tasks=CONCURRENCY, max_prefetch=PREFETCHED)

    uvloop.run(main())


def _broker_and_task(location: str, starts: Starts) -> tuple[Any, Any]:
    async def do_nothing(number: int) -> None:
        starts.add(number)

    broker = RedisStreamBroker(location, max_connection_pool_size=CALLERS + CONCURRENCY)
    return broker, broker.register_task(do_nothing, "do_nothing")


if __name__ == "__main__":
    run_with_worker(add, work)
