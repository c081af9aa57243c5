"""Huey on SQLite, with its own consumer process. `fsync=True` makes each commit wait for the disk.

The consumer deletes a task when it takes it, so a crash of the consumer loses the task.
"""

from typing import Any

from huey import SqliteHuey  # type: ignore[import-not-found]

from benchmarks.libraries.contestant import POLL_SECONDS, Calls, Starts, run_with_worker

WORKERS = 1  # threads; more are slower, because one at a time uses the database


def add(location: str, calls: Calls) -> None:
    """See contestant.run_with_worker."""
    _, task = _huey_and_task(location, Starts(0))
    calls.make_plain(task)


def work(location: str, starts: Starts) -> None:
    """See contestant.run_with_worker."""
    huey, _ = _huey_and_task(location, starts)
    consumer = huey.create_consumer(
        workers=WORKERS, periodic=False, initial_delay=POLL_SECONDS, max_delay=POLL_SECONDS
    )
    print("ready", flush=True)
    consumer.run()


def _huey_and_task(location: str, starts: Starts) -> tuple[Any, Any]:
    huey = SqliteHuey(filename=location, fsync=True)

    def do_nothing(number: int) -> None:
        starts.add(number)

    return huey, huey.task()(do_nothing)


if __name__ == "__main__":
    run_with_worker(add, work)
