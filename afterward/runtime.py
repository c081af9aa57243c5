"""One object that starts and stops everything: `Afterward(url, tasks=[...])`."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterable
from typing import Any, Generic, TypeVar

from afterward.engine import Engine
from afterward.engines import open_engine
from afterward.queue import Queue
from afterward.registry import Function, Registry, TaskKind
from afterward.retention import remove_regularly
from afterward.retry import RetryPolicy
from afterward.task_log import TaskLog
from afterward.worker import Worker

DAY_SECONDS = 24 * 3600.0

ToolsT = TypeVar("ToolsT")


class Afterward(Generic[ToolsT]):
    """Durable tasks on one database, with a worker in this process.

        afterward = Afterward("sqlite:///queue.db", tasks=[send_email])
        app = FastAPI(lifespan=afterward.lifespan)

    `database` is a URL (see `open_engine`) or an engine. `tasks` names each function that may run,
    a TaskKind where it has a retry policy of its own; the others have `retry`. Every function gets
    `tools` as `context.tools`: a mailer, for example.

    `concurrency` is the number of tasks that run at once; with 0 there is no worker, because others
    run the tasks. `lease_seconds` is the time after which the task of a dead worker runs again,
    `timeout_seconds` the most that one attempt may take. At the stop, running tasks have
    `grace_seconds` to finish; those that do not are given back. Finished tasks are kept for
    `retention_days`. At most `max_backlog` tasks may be unfinished; one more is refused.
    """

    def __init__(  # noqa: PLR0913 -- keyword-only settings
        self,
        database: str | Engine,
        *,
        tasks: Iterable[Function | TaskKind],
        tools: ToolsT = None,  # type: ignore[assignment]
        retry: RetryPolicy = RetryPolicy(),  # noqa: B008 -- it cannot be changed
        concurrency: int = 10,
        lease_seconds: float = 30.0,
        timeout_seconds: float = 900.0,
        grace_seconds: float = 10.0,
        retention_days: float = 7.0,
        max_backlog: int = 1_000_000,
    ) -> None:
        engine = open_engine(database) if isinstance(database, str) else database
        self.queue: Queue[ToolsT] = Queue(engine, Registry(*tasks), retry, max_backlog=max_backlog)
        self.queue.events.subscribe(TaskLog().write)
        self.queue.events.subscribe(engine.publish)
        self._tools = tools
        self._concurrency = concurrency
        self._lease_seconds = lease_seconds
        self._timeout_seconds = timeout_seconds
        self._grace_seconds = grace_seconds
        self._retention_days = retention_days

    @contextlib.asynccontextmanager
    async def lifespan(self, _: Any) -> AsyncIterator[dict[str, Any]]:
        """Run for as long as a FastAPI app does, as its `lifespan`.

        A lifespan of your own can use it: `async with afterward.lifespan(app) as state`, and then
        `yield {**state, ...}`. DurableRoute finds the queue in that state.
        """
        async with self.running() as queue:
            yield {"queue": queue}

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Queue[ToolsT]]:
        """Start the engine, retention and the worker; stop them in the opposite order.

        Raises CannotStart with the reason in one line.
        """
        async with contextlib.AsyncExitStack() as stack:
            await self.queue.engine.start()
            stack.push_async_callback(self.queue.engine.stop)
            keep_seconds = self._retention_days * DAY_SECONDS
            retention = asyncio.create_task(remove_regularly(self.queue, keep_seconds))
            stack.push_async_callback(_end, retention)
            if self._concurrency:
                worker = Worker(
                    self.queue,
                    self._tools,
                    concurrency=self._concurrency,
                    lease=self._lease_seconds,
                    task_timeout=self._timeout_seconds,
                )
                await worker.start()
                stack.push_async_callback(worker.stop, self._grace_seconds)
            yield self.queue


async def _end(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
