"""This project's queue, with its relay of events to other processes."""

import time

from afterward.engines import open_engine
from afterward.engines.postgres.schema import migrate
from afterward.events import Event, EventType
from afterward.queue import Queue
from afterward.registry import Registry
from afterward.retry import RetryPolicy
from afterward.unit_of_work import Context
from afterward.worker import Worker
from app.observability.logs import configure_logging
from benchmarks.queues.contestant import Count, put_by_batches, put_by_callers, run


async def do_nothing(_: Context[None], *, number: int) -> None:
    """Return at once."""


class Afterward:
    """The queue and worker of the service."""

    async def make(self, url: str) -> None:
        """See Contestant."""
        await migrate(url)

    async def put(self, url: str, tasks: int) -> float:
        """See Contestant."""
        queue = await _start(url)

        async def put(number: int) -> None:
            promises = queue.collect()
            promises.add_task(do_nothing, number=number)
            await queue.commit(promises.collected())

        seconds = await put_by_callers(tasks, put)
        await queue.engine.stop()
        return seconds

    async def put_batches(self, url: str, tasks: int) -> float:
        """See Contestant."""
        queue = await _start(url)

        async def put(numbers: range) -> None:
            promises = queue.collect()
            for number in numbers:
                promises.add_task(do_nothing, number=number)
            await queue.commit(promises.collected())

        seconds = await put_by_batches(tasks, put)
        await queue.engine.stop()
        return seconds

    async def drain(self, url: str, tasks: int, concurrency: int) -> float:
        """See Contestant."""
        queue = await _start(url)
        worker = Worker(queue, None, concurrency=concurrency)
        count = Count(tasks)

        def count_success(event: Event) -> None:
            if event.type is EventType.SUCCEEDED:
                count.add()

        queue.events.subscribe(count_success)
        await worker.start()
        await count.reached.wait()
        await worker.stop(grace=5)
        await queue.engine.stop()
        return count.seconds


async def _start(url: str) -> Queue[None]:
    engine = open_engine(url)
    await engine.start()
    queue = Queue(engine, Registry[None](do_nothing), RetryPolicy(), now=time.time)
    queue.events.subscribe(engine.publish)
    return queue


if __name__ == "__main__":
    configure_logging("WARNING", "json")
    run(Afterward())
