"""The two measurements of each library, and the command line that runs them.

python -m benchmarks.libraries.NAME idle LOCATION TASKS
python -m benchmarks.libraries.NAME busy LOCATION TASKS

`idle` adds one task at a time, with pauses, and prints the seconds from each call to the start of
its function. `busy` adds all tasks as fast as it can, and prints the seconds from the first call to
the start of the last function. Both print a JSON list. LOCATION is the path of a new SQLite
database, or the URL of an empty Redis.

If a library has a worker process of its own, the first process starts it with the verb `work`.
"""

import argparse
import asyncio
import json
import random
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

CALLERS = 64  # concurrent callers of a coroutine function that adds tasks
POLL_SECONDS = 0.01  # the interval of workers that poll

# Tasks that are added first, and do not count. After so many, SQLite writes over the pages of its
# WAL, as in a service that has run for a while, instead of making the file longer.
WARM_UP = 500

# Before each task of `idle`: random, so that it meets a polling worker at any time.
PAUSE_SECONDS = (0.015, 0.025)


@dataclass
class Starts:
    """Notes when the functions of tasks start."""

    expected: int
    times: dict[int, float] = field(default_factory=dict)  # by the number of the task
    complete: threading.Event = field(default_factory=threading.Event)

    def add(self, number: int) -> None:
        """Note that the function of this task starts now."""
        self.times[number] = time.perf_counter()
        if len(self.times) == self.expected:
            self.complete.set()


@dataclass
class Calls:
    """Makes the calls that add tasks, and notes when."""

    tasks: int
    is_idle: bool
    times: dict[int, float] = field(default_factory=dict)  # by the number of the task

    async def make(self, add: Callable[[int], Awaitable[object]]) -> None:
        """Call a coroutine function for each task. `busy` has 64 concurrent callers."""
        for number in range(WARM_UP):
            await add(number)
        await asyncio.sleep(1)  # until the warm-up has run
        numbers = iter(self._numbers())

        async def call() -> None:
            for number in numbers:
                if self.is_idle:
                    await asyncio.sleep(random.uniform(*PAUSE_SECONDS))
                self.times[number] = time.perf_counter()
                await add(number)

        async with asyncio.TaskGroup() as callers:
            for _ in range(1 if self.is_idle else CALLERS):
                callers.create_task(call())

    def make_plain(self, add: Callable[[int], object]) -> None:
        """Call a plain function for each task.

        `busy` calls it from a single thread. Several are slower, because each of these libraries
        lets one thread at a time use the database.
        """
        for number in range(WARM_UP):
            add(number)
        time.sleep(1)  # until the warm-up has run
        for number in self._numbers():
            if self.is_idle:
                time.sleep(random.uniform(*PAUSE_SECONDS))
            self.times[number] = time.perf_counter()
            add(number)

    def seconds(self, starts: dict[int, float]) -> list[float]:
        """Return the seconds that the verb measures."""
        if self.is_idle:
            return [starts[number] - self.times[number] for number in self._numbers()]
        return [max(starts.values()) - min(self.times.values())]

    def _numbers(self) -> range:
        return range(WARM_UP, WARM_UP + self.tasks)


def run(measure: Callable[[str, Calls, Starts], None]) -> None:
    """Run a library that has its worker in the same process.

    `measure` gets the location. It starts a worker, makes the calls, and returns when all functions
    have started.
    """
    asked = _arguments()
    calls, starts = Calls(asked.tasks, asked.verb == "idle"), Starts(WARM_UP + asked.tasks)
    measure(asked.location, calls, starts)
    print(json.dumps(calls.seconds(starts.times)))


def run_with_worker(add: Callable[[str, Calls], None], work: Callable[[str, Starts], None]) -> None:
    """Run a library that has its worker in another process.

    Both functions get the location. `add` makes the calls. `work` prints a line when the worker is
    ready, and runs it until the process is killed.
    """
    asked = _arguments()
    if asked.verb == "work":
        starts = Starts(WARM_UP + asked.tasks)
        threading.Thread(target=_print_when_complete, args=[starts], daemon=True).start()
        work(asked.location, starts)
        return
    calls = Calls(asked.tasks, asked.verb == "idle")
    with _worker(asked.location, asked.tasks) as lines:
        next(lines)  # it is ready
        add(asked.location, calls)
        starts_by_number = {int(number): at for number, at in json.loads(next(lines)).items()}
    print(json.dumps(calls.seconds(starts_by_number)))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("verb", choices=("idle", "busy", "work"))
    parser.add_argument("location")
    parser.add_argument("tasks", type=int)
    return parser.parse_args()


@contextmanager
def _worker(location: str, tasks: int) -> Iterator[Iterator[str]]:
    """Run the worker of the library's module; yield the lines that it prints."""
    module = sys.modules["__main__"].__spec__
    assert module is not None
    command = [sys.executable, "-m", module.name, "work", location, str(tasks)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield iter(process.stdout)
        finally:
            process.kill()


def _print_when_complete(starts: Starts) -> None:
    # perf_counter is the same clock in all processes of a machine.
    starts.complete.wait()
    print(json.dumps(starts.times), flush=True)
