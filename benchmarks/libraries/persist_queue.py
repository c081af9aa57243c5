"""persist-queue on SQLite: its queue with acknowledgements, and a thread that works on the tasks.

It leaves SQLite's default, so each commit waits for the disk. The tasks of a crashed process are in
the queue again when the queue is next opened. It has no worker, no retries and no timeouts.
"""

import threading

from persistqueue import SQLiteAckQueue  # type: ignore[import-not-found]

from benchmarks.libraries.contestant import Calls, Starts, run

# A read passes over all acknowledged tasks that are still stored, so they are removed regularly.
CLEAR_AFTER_TASKS = 100


def measure(location: str, calls: Calls, starts: Starts) -> None:
    """See contestant.run."""
    queue = SQLiteAckQueue(location, multithreading=True)

    def work() -> None:
        while True:
            number = queue.get()
            starts.add(number)
            queue.ack(number)
            if number % CLEAR_AFTER_TASKS == 0:
                queue.clear_acked_data(max_delete=2 * CLEAR_AFTER_TASKS, keep_latest=0)

    threading.Thread(target=work, daemon=True).start()
    calls.make_plain(queue.put)
    starts.complete.wait()


if __name__ == "__main__":
    run(measure)
