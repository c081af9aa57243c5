"""Runs tasks of the service in a test, on a clock that only the test advances."""

import traceback
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Concatenate, ParamSpec, cast

from afterward.engine import Engine
from afterward.events import Event
from afterward.queue import Queue
from afterward.registry import Registry, TaskKind
from afterward.retry import RetryPolicy, is_unexpected
from afterward.task import Task
from afterward.worker import Worker
from app.settings import Settings
from app.tasks import registry
from app.tasks.tools import Context, Tools
from tests.library.support import Clock, opened

P = ParamSpec("P")

STEP = 60.0  # seconds that the clock advances between two polls of the worker


class TaskRunner:
    """A queue and its worker. An hour of retries takes a moment, because the test sets the clock.

        async with task_runner(tmp_path, sms=sms) as runner:
            task = await runner.add(send_sms, numbers=["+44 1"], text="Hello")
            await runner.run()              # the first attempt
            await runner.run(seconds=3600)  # the attempts of the next hour
            assert (await runner.read(task)).status is Status.SUCCEEDED

    The kinds of tasks and their retry policies are the service's, unless `kinds` are given.
    """

    def __init__(self, engine: Engine, tools: object, *kinds: TaskKind) -> None:
        self.clock = Clock()
        self._engine = engine
        known = Registry[Tools](*kinds) if kinds else registry(Settings(_env_file=None))
        self.queue = Queue(engine, known, RetryPolicy(), now=self.clock)
        self.queue.events.subscribe(_print_unexpected_error)
        self._worker = Worker(self.queue, cast("Tools", tools))

    async def add(
        self,
        function: Callable[Concatenate[Context, P], Coroutine[Any, Any, Any]],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> Task:
        """Queue a task, as a request does."""
        async with self.queue.transaction() as transaction:
            return transaction.add_task(function, *args, **kwargs)

    async def run(self, *, seconds: float = 0.0) -> None:
        """Run the due tasks, then advance the clock by so much and run each task that is due."""
        end = self.clock.now + seconds
        await self._worker.run_until_idle()
        while self.clock.now < end:
            self.clock.now = min(self.clock.now + STEP, end)
            await self._worker.run_until_idle()

    async def read(self, task: Task) -> Task:
        """Return the task as it is stored now."""
        return await self._engine.get(task.id)


def _print_unexpected_error(event: Event) -> None:
    """Print the traceback of a bug in a task. pytest shows it if the test fails."""
    if event.exception is not None and is_unexpected(event.exception):
        traceback.print_exception(event.exception)


@asynccontextmanager
async def task_runner(directory: Path, **tools: object) -> AsyncIterator[TaskRunner]:
    """Make a runner with its database in `directory`. Tasks find `tools` in `context.tools`."""
    async with opened(directory / "queue.db") as engine:
        yield TaskRunner(engine, SimpleNamespace(**tools))
