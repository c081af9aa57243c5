"""Afterward(url, tasks=[...]): one object that starts and stops all parts of the library."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterable
from typing import TYPE_CHECKING, Any, Generic

from afterward.engine import Engine
from afterward.engines import open_engine
from afterward.errors import CannotStart
from afterward.queue import Queue
from afterward.registry import Registry, TaskKind
from afterward.retention import remove_regularly
from afterward.retry import RetryPolicy
from afterward.signature import Function
from afterward.task_log import TaskLog
from afterward.tracing import NO_TRACING, Tracing
from afterward.worker import Worker

DAY_SECONDS = 24 * 3600.0
CANCEL_SECONDS = 5.0  # the longest that a database that hangs can hold up the stop of retention

if TYPE_CHECKING:
    from typing_extensions import TypeVar

    ToolsT = TypeVar("ToolsT", default=None)  # typing has no defaults before Python 3.13
else:
    from typing import TypeVar

    ToolsT = TypeVar("ToolsT")


class Afterward(Generic[ToolsT]):
    """Durable tasks on one database, with a worker in this process.

        afterward = Afterward("sqlite:///queue.db", tasks=[send_email])
        app = FastAPI(lifespan=afterward.lifespan)

    Without FastAPI, for example in a script that adds a task:

        async with afterward.running() as queue, queue.transaction() as transaction:
            transaction.add_task(send_email, "ada@example.com")

    `database` is a URL (see `open_engine`) or an engine. `tasks` has each function that may run; a
    TaskKind gives a function a retry policy of its own instead of `retry`. Every function gets
    `tools` as `context.tools`: a mailer, for example.

    `concurrency` is the number of tasks that run at once. With 0 there is no worker: processes of
    their own run the tasks. On PostgreSQL, other workers run a worker's tasks again if it sends no
    heartbeat for `lease_seconds`. On SQLite, the tasks of a crash run again right after the
    restart. One attempt may take `timeout_seconds`. When the app stops, running tasks have
    `grace_seconds` to finish; after that they are given back, and run again later, or fail if they
    have a single attempt. Finished tasks are removed after `retention_days`, failed ones after
    `retention_failed_days`. With `max_backlog` unfinished tasks, new ones are refused. `tracing`
    may be an `OpenTelemetry` of `afterward.opentelemetry`, which traces requests and their tasks.

    Each change of a task is logged, if the level of Python's root logger allows it: at DEBUG when
    it is queued, starts or reports progress; at INFO when it succeeds, is cancelled, or is run now
    on request; at WARNING when an attempt fails or is interrupted; at ERROR when the task fails for
    good. Python's default is WARNING, so call `logging.basicConfig(level=logging.INFO)`.
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
        retention_failed_days: float = 30.0,
        max_backlog: int = 1_000_000,
        tracing: Tracing = NO_TRACING,
    ) -> None:
        if concurrency < 0 or min(lease_seconds, timeout_seconds) <= 0:
            raise ValueError("concurrency must be 0 or more; lease and timeout more than 0 seconds")
        engine = open_engine(database) if isinstance(database, str) else database
        self.queue: Queue[ToolsT] = Queue(
            engine, Registry(*tasks), retry, max_backlog=max_backlog, tracing=tracing
        )
        self.queue.events.subscribe(TaskLog().write)
        self.queue.events.subscribe(engine.publish)
        self._tools = tools
        self._concurrency = concurrency
        self._lease_seconds = lease_seconds
        self._timeout_seconds = timeout_seconds
        self._grace_seconds = grace_seconds
        self._retention = retention_days * DAY_SECONDS, retention_failed_days * DAY_SECONDS
        self._is_running = False

    @contextlib.asynccontextmanager
    async def lifespan(self, app: Any) -> AsyncIterator[dict[str, Any]]:
        """Start and stop with a FastAPI app: FastAPI(lifespan=afterward.lifespan).

        DurableRoute finds the queue in the state that this yields. A lifespan of your own passes it
        on:

            @asynccontextmanager
            async def lifespan(app):
                async with afterward.lifespan(app) as state:
                    yield {**state, "mailer": mailer}

        Raises CannotStart if another Afterward object has started with this app, because the state
        has one queue.
        """
        if getattr(app.state, "has_afterward", False):
            raise CannotStart(
                "this app has another Afterward object. Start only one by its lifespan, and this "
                "one with `async with afterward.running()`"
            )
        async with self.running() as queue:
            app.state.has_afterward = True
            try:
                yield {"queue": queue}
            finally:
                app.state.has_afterward = False

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Queue[ToolsT]]:
        """Start the engine, retention and the worker; stop them in the opposite order.

        After the stop, it can be started again. Raises CannotStart with the reason in one line.
        """
        if self._is_running:
            raise CannotStart("this Afterward object is running already")
        async with contextlib.AsyncExitStack() as stack:
            self._is_running = True
            stack.callback(setattr, self, "_is_running", False)
            await self.queue.engine.start()
            stack.push_async_callback(self.queue.engine.stop)
            retention = asyncio.create_task(
                remove_regularly(self.queue, *self._retention), name="retention"
            )
            stack.push_async_callback(_cancel, retention)
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


async def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait([task], timeout=CANCEL_SECONDS)
