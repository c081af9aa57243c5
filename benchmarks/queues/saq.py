"""SAQ with its PostgreSQL queue and its own worker. It can only add tasks singly.

The worker polls, which is not slower here: when SAQ uses LISTEN, connections return to its pool
while they still listen.
"""

from typing import Any

from saq import Queue, Worker  # type: ignore[import-not-found]

from benchmarks.queues.contestant import Count, put_by_callers, run

CONNECTIONS = 10
POLL_SECONDS = 0.01


class SAQ:
    """SAQ's worker."""

    async def make(self, url: str) -> None:
        """See Contestant."""
        await (await _queue(url)).disconnect()

    async def put(self, url: str, tasks: int) -> float:
        """See Contestant."""
        queue = await _queue(url)
        seconds = await put_by_callers(
            tasks, lambda number: queue.enqueue("do_nothing", number=number)
        )
        await queue.disconnect()
        return seconds

    async def put_batches(self, url: str, tasks: int) -> float:
        """Add tasks singly, because SAQ has no batches on PostgreSQL."""
        return await self.put(url, tasks)

    async def drain(self, url: str, tasks: int, concurrency: int) -> float:
        """See Contestant."""
        queue = await _queue(url)

        async def do_nothing(_: Any, *, number: int) -> None:
            """Return at once."""

        async def done(_: Any) -> None:
            count.add()
            if count.reached.is_set():
                worker.event.set()

        worker = Worker(
            queue,
            [("do_nothing", do_nothing)],
            concurrency=concurrency,
            after_process=done,
            poll_interval=POLL_SECONDS,
        )
        count = Count(tasks)
        await worker.start()
        assert count.so_far == tasks, count.so_far
        await queue.disconnect()
        return count.seconds


async def _queue(url: str) -> Any:
    queue = Queue.from_url(url, min_size=CONNECTIONS, max_size=CONNECTIONS)
    await queue.connect()
    return queue


if __name__ == "__main__":
    run(SAQ())
