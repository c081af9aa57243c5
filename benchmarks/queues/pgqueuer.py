"""PGQueuer with its own worker and with durable tables, like this project's."""

from datetime import timedelta
from typing import Any

import asyncpg
from pgqueuer.adapters.persistence.qb import (
    QueryBuilderEnvironment,
    QueryQueueBuilder,
    QuerySchedulerBuilder,
)
from pgqueuer.db import AsyncpgPoolDriver
from pgqueuer.domain.settings import DBSettings, Durability
from pgqueuer.models import Job
from pgqueuer.qm import QueueManager
from pgqueuer.queries import Queries
from pgqueuer.types import QueueExecutionMode

from benchmarks.queues.contestant import BATCH, Count, put_by_batches, put_by_callers, run

CONNECTIONS = 5
SETTINGS = DBSettings(durability=Durability.balanced)


class PGQueuer:
    """PGQueuer's QueueManager."""

    async def make(self, url: str) -> None:
        """See Contestant."""
        async with asyncpg.create_pool(url, min_size=1) as pool:
            await _queries(pool).install()
            await _queries(pool).optimize_autovacuum()

    async def put(self, url: str, tasks: int) -> float:
        """See Contestant."""
        async with asyncpg.create_pool(url, min_size=CONNECTIONS, max_size=CONNECTIONS) as pool:
            queries = _queries(pool)
            return await put_by_callers(
                tasks, lambda number: queries.enqueue("task", b"%d" % number)
            )

    async def put_batches(self, url: str, tasks: int) -> float:
        """See Contestant."""
        async with asyncpg.create_pool(url, min_size=1) as pool:
            queries = _queries(pool)

            async def put(numbers: range) -> None:
                await queries.enqueue(
                    ["task"] * len(numbers),
                    [b"%d" % number for number in numbers],
                    [0] * len(numbers),
                )

            return await put_by_batches(tasks, put)

    async def drain(self, url: str, tasks: int, concurrency: int) -> float:
        """See Contestant. PGQueuer runs all tasks of a claim at the same time."""
        async with asyncpg.create_pool(url, min_size=CONNECTIONS, max_size=CONNECTIONS) as pool:
            manager = QueueManager(queries := _queries(pool))

            @manager.entrypoint("task")
            async def do_nothing(_: Job) -> None:
                """Return at once."""

            count = queries.count = Count(tasks)
            await manager.run(
                dequeue_timeout=timedelta(seconds=0.1),
                batch_size=concurrency or BATCH,
                mode=QueueExecutionMode.drain,
            )
        assert count.so_far == tasks, count.so_far
        return count.seconds


class _Queries(Queries):
    """PGQueuer's statements, with a count of the tasks that were logged as done."""

    count: Count

    async def log_jobs(self, job_status: list[Any]) -> None:
        """Log the outcomes of tasks, and count them."""
        await super().log_jobs(job_status)
        self.count.add(len(job_status))


def _queries(pool: "asyncpg.Pool[Any]") -> _Queries:
    return _Queries(
        AsyncpgPoolDriver(pool),
        QueryBuilderEnvironment(SETTINGS),
        QueryQueueBuilder(SETTINGS),
        QuerySchedulerBuilder(SETTINGS),
    )


if __name__ == "__main__":
    run(PGQueuer())
