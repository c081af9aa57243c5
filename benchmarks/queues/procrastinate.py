"""Procrastinate with its own worker."""

from typing import Any

from procrastinate import App, PsycopgConnector  # type: ignore[import-not-found]

from benchmarks.queues.contestant import Count, put_by_batches, put_by_callers, run

CONNECTIONS = 10


class Procrastinate:
    """Procrastinate's worker, which fetches a single task at a time."""

    async def make(self, url: str) -> None:
        """See Contestant."""
        async with _app(url).open_async() as app:
            await app.schema_manager.apply_schema_async()

    async def put(self, url: str, tasks: int) -> float:
        """See Contestant."""
        async with _app(url).open_async() as app:
            task = app.tasks["do_nothing"]
            return await put_by_callers(tasks, lambda number: task.defer_async(number=number))

    async def put_batches(self, url: str, tasks: int) -> float:
        """See Contestant."""
        async with _app(url).open_async() as app:
            task = app.tasks["do_nothing"]
            return await put_by_batches(
                tasks,
                lambda numbers: task.batch_defer_async(*({"number": n} for n in numbers)),
            )

    async def drain(self, url: str, tasks: int, concurrency: int) -> float:
        """See Contestant."""
        async with _app(url).open_async() as app:
            finish = app.job_manager.finish_job

            async def finish_and_count(*arguments: Any, **options: Any) -> None:
                await finish(*arguments, **options)
                count.add()

            app.job_manager.finish_job = finish_and_count
            count = Count(tasks)
            await app.run_worker_async(
                concurrency=concurrency, wait=False, install_signal_handlers=False
            )
        assert count.so_far == tasks, count.so_far
        return count.seconds


def _app(url: str) -> Any:
    app = App(connector=PsycopgConnector(conninfo=url, min_size=CONNECTIONS, max_size=CONNECTIONS))

    async def do_nothing(*, number: int) -> None:
        """Return at once."""

    app.task(do_nothing, name="do_nothing")
    return app


if __name__ == "__main__":
    run(Procrastinate())
