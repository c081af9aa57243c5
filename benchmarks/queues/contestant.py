"""The operations that each queue implements, and the command line that runs them.

python -m benchmarks.queues.NAME make URL
python -m benchmarks.queues.NAME put URL TASKS
python -m benchmarks.queues.NAME put-batches URL TASKS
python -m benchmarks.queues.NAME drain URL TASKS CONCURRENCY

Each operation runs in its own process. It prints the seconds from the first task to the last,
without the time to connect.
"""

import argparse
import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Protocol

import uvloop

CALLERS = 64  # concurrent callers of `put`
BATCH = 100


class Contestant(Protocol):
    """A queue on PostgreSQL with an empty task. All methods except `make` return seconds."""

    async def make(self, url: str) -> None:
        """Create the tables in an empty database."""

    async def put(self, url: str, tasks: int) -> float:
        """Add tasks singly, by 64 concurrent callers."""

    async def put_batches(self, url: str, tasks: int) -> float:
        """Add tasks in batches of 100, by a single caller."""

    async def drain(self, url: str, tasks: int, concurrency: int) -> float:
        """Run all waiting tasks with a single worker."""


@dataclass
class Count:
    """Counts tasks up to a goal, and measures the time until then."""

    goal: int
    reached: asyncio.Event = field(default_factory=asyncio.Event)
    began: float = field(default_factory=time.perf_counter)
    seconds: float = 0.0
    so_far: int = 0

    def add(self, more: int = 1) -> None:
        """Add to the count."""
        self.so_far += more
        if self.so_far >= self.goal:
            self.seconds = time.perf_counter() - self.began
            self.reached.set()


async def put_by_callers(tasks: int, put: Callable[[int], Awaitable[object]]) -> float:
    """Put tasks singly by several concurrent callers; return the seconds."""
    numbers = iter(range(tasks))

    async def call() -> None:
        for number in numbers:
            await put(number)

    began = time.perf_counter()
    async with asyncio.TaskGroup() as callers:
        for _ in range(CALLERS):
            callers.create_task(call())
    return time.perf_counter() - began


async def put_by_batches(tasks: int, put: Callable[[range], Awaitable[object]]) -> float:
    """Put tasks in batches of 100; return the seconds."""
    began = time.perf_counter()
    for first in range(0, tasks, BATCH):
        await put(range(first, min(first + BATCH, tasks)))
    return time.perf_counter() - began


def run(contestant: Contestant) -> None:
    """Run the operation that the command line names, and print its seconds."""
    parser = argparse.ArgumentParser()
    parser.add_argument("verb", choices=("make", "put", "put-batches", "drain"))
    parser.add_argument("url")
    parser.add_argument("tasks", type=int, nargs="?", default=0)
    parser.add_argument("concurrency", type=int, nargs="?", default=0)
    asked = parser.parse_args()

    async def run_verb() -> float:
        if asked.verb == "put":
            return await contestant.put(asked.url, asked.tasks)
        if asked.verb == "put-batches":
            return await contestant.put_batches(asked.url, asked.tasks)
        if asked.verb == "drain":
            return await contestant.drain(asked.url, asked.tasks, asked.concurrency)
        await contestant.make(asked.url)
        return 0.0

    # All queues run on uvloop, the fastest event loop.
    print(uvloop.run(run_verb()))
