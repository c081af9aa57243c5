"""litequeue on SQLite, with a process that polls it, because litequeue has no worker.

It sets `synchronous = NORMAL`, so a power cut may lose the last tasks; here each commit waits for
the disk. A task stays locked if its process crashes: the app must find and release it itself.
"""

import time

from litequeue import LiteQueue  # type: ignore[import-not-found]

from benchmarks.libraries.contestant import POLL_SECONDS, Calls, Starts, run_with_worker


def add(location: str, calls: Calls) -> None:
    """See contestant.run_with_worker."""
    queue = _open(location)
    calls.make_plain(lambda number: queue.put(str(number)))


def work(location: str, starts: Starts) -> None:
    """See contestant.run_with_worker."""
    queue = _open(location)
    print("ready", flush=True)
    while True:
        if (message := queue.pop()) is None:
            time.sleep(POLL_SECONDS)
            continue
        starts.add(int(message.data))
        queue.done(message.message_id)


def _open(location: str) -> "LiteQueue":
    queue = LiteQueue(location, timeout=10)
    queue.conn.execute("PRAGMA synchronous = FULL")
    return queue


if __name__ == "__main__":
    run_with_worker(add, work)
