"""What each queue is asked for, and the command that asks: each in a process of its own.

python -m benchmarks.queues.NAME make URL
python -m benchmarks.queues.NAME put URL TASKS
python -m benchmarks.queues.NAME put-batches URL TASKS
python -m benchmarks.queues.NAME drain URL TASKS CONCURRENCY

Prints how many seconds it took, from the first task to the last; connecting is not counted.
"""

import argparse
import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Protocol

import uvloop

CALLERS = 64  # who put tasks at once
BATCH = 100


class Contestant(Protocol):
    """A queue on PostgreSQL, with one kind of task, which does nothing."""

    async def make(self, url: str) -> None:
        """Make the tables in an empty database."""

    async def put(self, url: str, tasks: int) -> float:
        """Add tasks one by one, for 64 callers at once."""

    async def put_batches(self, url: str, tasks: int) -> float:
        """Add tasks a hundred at a time, for one caller."""

    async def drain(self, url: str, tasks: int, concurrency: int) -> float:
        """Run all the tasks that there are with one worker."""


@dataclass
class Count:
    """Counts to a number, and notes when it is reached."""

    goal: int
    reached: asyncio.Event = field(default_factory=asyncio.Event)
    began: float = field(default_factory=time.perf_counter)
    seconds: float = 0.0
    so_far: int = 0

    def add(self, more: int = 1) -> None:
        """Count."""
        self.so_far += more
        if self.so_far >= self.goal:
            self.seconds = time.perf_counter() - self.began
            self.reached.set()


async def by_callers(tasks: int, put: Callable[[int], Awaitable[object]]) -> float:
    """Put tasks one by one for each of several callers; gives the seconds."""
    numbers = iter(range(tasks))

    async def call() -> None:
        for number in numbers:
            await put(number)

    began = time.perf_counter()
    async with asyncio.TaskGroup() as callers:
        for _ in range(CALLERS):
            callers.create_task(call())
    return time.perf_counter() - began


async def by_batches(tasks: int, put: Callable[[range], Awaitable[object]]) -> float:
    """Put tasks a hundred at a time; gives the seconds."""
    began = time.perf_counter()
    for first in range(0, tasks, BATCH):
        await put(range(first, min(first + BATCH, tasks)))
    return time.perf_counter() - began


def run(contestant: Contestant) -> None:
    """Do what the command line asks for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("verb", choices=("make", "put", "put-batches", "drain"))
    parser.add_argument("url")
    parser.add_argument("tasks", type=int, nargs="?", default=0)
    parser.add_argument("concurrency", type=int, nargs="?", default=0)
    asked = parser.parse_args()

    async def obey() -> float:
        if asked.verb == "put":
            return await contestant.put(asked.url, asked.tasks)
        if asked.verb == "put-batches":
            return await contestant.put_batches(asked.url, asked.tasks)
        if asked.verb == "drain":
            return await contestant.drain(asked.url, asked.tasks, asked.concurrency)
        await contestant.make(asked.url)
        return 0.0

    # All of them on the loop that is the fastest.
    print(uvloop.run(obey()))
