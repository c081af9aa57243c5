"""Group commit: operations that arrive while a commit is under way share the next transaction.

A commit waits until the disk has the data (fsync). This takes as long for one task as for sixty. So
operations wait in a queue, and each transaction takes all operations that have arrived. Under load,
durability costs a request almost nothing, and an idle app answers as fast as its disk allows.

For example, requests B, C and D share one commit, because they arrive during the commit of A. Time
runs from top to bottom, and an fsync takes 5 ms here:

            event loop                            thread of the connection

     0 ms   A calls run()
            the group [A] is handed over  ---->   BEGIN, statement of A, COMMIT
     1 ms   B calls run(), and waits                 |
     2 ms   C calls run(), and waits                 | fsync
     4 ms   D calls run(), and waits                 |
     5 ms   run() returns to A            <----   A is durable
            GATHER_ITERATIONS of the loop later:
            [B, C, D] is handed over      ---->   BEGIN, statements of B, C and D, COMMIT
                                                     | fsync
    10 ms   run() returns to B, C and D   <----   B, C and D are durable

If the statement of C raises an error, the transaction is rolled back. Then B, C and D run again,
each in a transaction of its own, so that only C gets the error.
"""

import asyncio
import contextlib
import queue
import sqlite3
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from afterward.engines.sqlite.database_file import forget_cached_log
from afterward.errors import CommitUnknown, QueueError, QueueFull, QueueUnavailable

# One statement handles up to this many items. Few statements are better, because each one releases
# Python's global interpreter lock, and may wait for it again while the event loop is busy. But the
# number has a limit, because the SQL text for each number of items stays in a cache.
CHUNK_SIZE = 100

# Wait this many loop iterations before the next commit. Callers woken by the last commit then have
# time to queue their next operation, and it joins the same transaction. For example, a worker that
# has written the end of a task claims its next task.
GATHER_ITERATIONS = 4

CLOSE_SECONDS = 3.0  # to wait for the last commit, and again for the connection to close

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")
Row = tuple[Any, ...]

BulkOperation = Callable[[sqlite3.Connection, Sequence[ItemT]], Sequence[ResultT]]
"""Does the same for each of several items, and returns a result for each item.

It executes one statement for up to CHUNK_SIZE items.
"""


@dataclass(slots=True)
class _Request:
    operation: BulkOperation[Any, Any]
    item: Any
    future: "asyncio.Future[Any]"
    is_mergeable: bool  # whether `operation` is one statement, and other requests may use it too


@dataclass(frozen=True, slots=True)
class _Refusal:
    """The result of an operation that raised a QueueError and wrote nothing."""

    error: QueueError


_Result = tuple["asyncio.Future[Any]", Any, BaseException | None]


class GroupCommit:
    """Runs operations on one connection, which belongs to one thread, in shared transactions.

    `connect` opens the connection in autocommit mode. It is called in the thread.
    """

    def __init__(self, connect: Callable[[], sqlite3.Connection]) -> None:
        self._connect = connect
        self._waiting: list[_Request] = []
        self._committing = False  # True from the first request of a group to its results
        self._is_open = False
        self._groups: queue.SimpleQueue[list[_Request]]
        self._thread: threading.Thread
        self._opened: asyncio.Future[None]

    async def start(self) -> None:
        """Start the thread, and open the connection. Raises the error of `connect`."""
        self._loop = asyncio.get_running_loop()
        self._opened = self._loop.create_future()
        self._groups = queue.SimpleQueue()
        self._thread = threading.Thread(
            target=self._commit_groups, name="queue-commits", daemon=True
        )
        self._thread.start()
        await self._opened
        self._is_open = True

    async def stop(self) -> bool:
        """Finish the operations that are waiting, and close the connection.

        Returns False if this takes longer than CLOSE_SECONDS, because the disk hangs. Then the
        thread still waits for the disk. It ends with the process at the latest.
        """
        # The groups are committed in order, so an empty operation ends after all others.
        last = asyncio.ensure_future(self.run(lambda _: None))
        ended, _ = await asyncio.wait([last], timeout=CLOSE_SECONDS)
        self._is_open = False
        self._groups.put([])  # an empty group ends the thread
        if not ended:
            last.cancel()
            return False
        with contextlib.suppress(QueueUnavailable):
            last.result()
        await asyncio.to_thread(self._thread.join, CLOSE_SECONDS)
        return not self._thread.is_alive()

    async def run(self, operation: Callable[[sqlite3.Connection], ResultT]) -> ResultT:
        """Run an operation, and return its result when its changes are durable."""

        def run_alone(
            connection: sqlite3.Connection, _: Sequence[None]
        ) -> list[ResultT | _Refusal]:
            changes = connection.total_changes
            try:
                return [operation(connection)]
            except QueueError as error:
                # An operation that raised before it wrote only refuses, as with TaskNotFound. Its
                # error is a result like any other. It must not abort the shared transaction.
                if connection.total_changes != changes:
                    raise
                return [_Refusal(error)]

        result = await self._enqueue(run_alone, None, is_mergeable=False)
        if isinstance(result, _Refusal):
            raise result.error
        return result

    async def run_merged(self, operation: BulkOperation[ItemT, ResultT], item: ItemT) -> ResultT:
        """Run a bulk operation for an item, in one statement with the waiting items of other calls.

        For example, 60 requests that each insert a task share one INSERT of 60 rows.
        """
        return await self._enqueue(operation, item, is_mergeable=True)

    async def _enqueue(
        self, operation: BulkOperation[ItemT, ResultT], item: ItemT, *, is_mergeable: bool
    ) -> ResultT:
        if not self._is_open:
            raise QueueUnavailable("The queue is not running.")
        future: asyncio.Future[ResultT] = self._loop.create_future()
        self._waiting.append(_Request(operation, item, future, is_mergeable))
        # While a commit is under way, `_deliver` starts the next one.
        if not self._committing:
            self._committing = True
            # Hand over at the end of this loop iteration, so that all of its requests are included.
            self._loop.call_soon(self._hand_over)
        return await future

    def _hand_over(self, after: int = 0) -> None:
        """Give the waiting requests to the thread as a group, after some loop iterations."""
        if after:
            self._loop.call_soon(self._hand_over, after - 1)
        else:
            group, self._waiting = self._waiting, []
            self._groups.put(group)

    def _deliver(self, results: list[_Result]) -> None:
        """Give the callers of a group their results, and begin the next group."""
        _resolve_futures(results)
        self._committing = bool(self._waiting)
        if self._waiting:
            self._hand_over(after=GATHER_ITERATIONS)

    def _commit_groups(self) -> None:
        """Commit one group after the other, until an empty group arrives. Runs in the thread."""
        try:
            connection = self._connect()
        except Exception as error:  # noqa: BLE001 - start() raises it
            self._loop.call_soon_threadsafe(self._opened.set_exception, error)
            return
        self._loop.call_soon_threadsafe(self._opened.set_result, None)
        while group := self._groups.get():
            self._loop.call_soon_threadsafe(self._deliver, self._commit(connection, group))
        connection.close()

    def _commit(self, connection: sqlite3.Connection, group: list[_Request]) -> list[_Result]:
        """Run a group in one transaction. If a request fails, run each one in its own transaction.

        Returns the results of the group, which may be errors.
        """
        # 1. Merge requests for the same bulk operation. For example, a group of 3 insertions, 2
        #    settlements and 1 query becomes 3 calls, with 3, 2 and 1 items.
        merged: dict[BulkOperation[Any, Any], list[_Request]] = {}
        for request in group:
            merged.setdefault(request.operation, []).append(request)

        # 2. A single statement needs no BEGIN and COMMIT, because SQLite commits it by itself.
        is_one_statement = len(merged) == 1 and group[0].is_mergeable and len(group) <= CHUNK_SIZE
        may_be_written = is_one_statement
        results: list[_Result] = []
        try:
            # 3. Begin. If an earlier ROLLBACK failed, its transaction is still open: end it first,
            #    because no statement of this group may join it.
            _roll_back(connection)
            if not is_one_statement:
                connection.execute("BEGIN IMMEDIATE")

            # 4. Run the operations, and collect the result of each request.
            for operation, requests in merged.items():
                values = operation(connection, [request.item for request in requests])
                pairs = zip(requests, values, strict=True)
                results += [(request.future, value, None) for request, value in pairs]

            # 5. Commit: one fsync for the whole group.
            if not is_one_statement:
                may_be_written = True
                connection.execute("COMMIT")
        except Exception as error:  # noqa: BLE001 - each caller gets it, or its own
            # 6. Undo everything. An error of ROLLBACK must not end the thread: step 3 of the next
            #    group tries again.
            with contextlib.suppress(sqlite3.Error):
                _roll_back(connection)
            if _is_disk_error(error):
                forget_cached_log(connection)

            # 7. Find the request that failed: run each alone. This does not help if every request
            #    would meet the same error, for example a locked file: then all get this error.
            if len(group) > 1 and not _hits_every_request(error):
                return [
                    result for request in group for result in self._commit(connection, [request])
                ]
            return [
                (request.future, None, _translate(error, may_be_written=may_be_written))
                for request in group
            ]
        return results


def _roll_back(connection: sqlite3.Connection) -> None:
    # After some errors SQLite has rolled back already (https://sqlite.org/lang_transaction.html).
    if connection.in_transaction:
        connection.execute("ROLLBACK")


def in_chunks(items: Sequence[ItemT]) -> Iterator[Sequence[ItemT]]:
    """Divide items into chunks of at most CHUNK_SIZE: 250 items into 100, 100 and 50."""
    for first in range(0, len(items), CHUNK_SIZE):
        yield items[first : first + CHUNK_SIZE]


def _hits_every_request(error: Exception) -> bool:
    """Tell whether every request would meet this error.

    A full disk is an exception, because operations that only read still succeed.
    """
    return _is_environment_error(error) and not _is_full(error)


def _is_full(error: Exception) -> bool:
    return _code(error) == sqlite3.SQLITE_FULL


def _is_disk_error(error: Exception) -> bool:
    # The lower 8 bits are the primary code; the others tell which call to the system failed.
    return _code(error) & 0xFF == sqlite3.SQLITE_IOERR


def _code(error: Exception) -> int:
    # Errors of Python's module, for example a wrong type of a parameter, have no code.
    return getattr(error, "sqlite_errorcode", sqlite3.SQLITE_OK)


# Errors of the environment: the file is locked, damaged or read-only, or the disk fails or is full.
# Every other error, such as an unknown column, is a bug in a statement, and waiting does not help.
_ENVIRONMENT_ERRORS = {
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_CORRUPT,
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_INTERRUPT,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_LOCKED,
    sqlite3.SQLITE_NOLFS,
    sqlite3.SQLITE_NOMEM,
    sqlite3.SQLITE_NOTADB,
    sqlite3.SQLITE_PERM,
    sqlite3.SQLITE_PROTOCOL,
    sqlite3.SQLITE_READONLY,
}


def _is_environment_error(error: Exception) -> bool:
    return isinstance(error, sqlite3.Error) and _code(error) & 0xFF in _ENVIRONMENT_ERRORS


def _translate(error: Exception, *, may_be_written: bool) -> Exception:
    """Return the error for a caller. `may_be_written` tells whether the commit had begun."""
    if not _is_environment_error(error):
        return error
    translated: QueueUnavailable
    if _is_full(error):
        translated = QueueFull()
    elif may_be_written and _is_disk_error(error):
        # A commit that could not be synced may be on the disk nevertheless. After a crash, SQLite
        # would find it in the write-ahead log (WAL).
        translated = CommitUnknown()
    else:
        translated = QueueUnavailable()
    translated.__cause__ = error
    return translated


def _resolve_futures(results: list[_Result]) -> None:
    for future, value, error in results:
        if future.done():  # its caller was cancelled
            continue
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(value)
