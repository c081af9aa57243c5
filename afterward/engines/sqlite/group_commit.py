"""Group commit: operations that arrive while a commit is under way share the next transaction.

A commit waits until the disk has the data (fsync). This takes as long for one task as for sixty. So
operations wait in a queue, and each transaction takes all operations that have arrived. Under load,
one fsync serves many requests. As a rule, a request waits for at most two: the one under way, and
its own. In an idle app, it waits for one.

Reads go through the same queue, because one connection runs all operations. So a read waits for the
fsync of its group. In return, it never shows a change that a power cut could still undo.

For example, requests B, C and D share one commit, because they arrive during the commit of A. Time
runs from top to bottom, and an fsync takes 5 ms here:

            event loop                            thread of the connection

     0 ms   A calls run()
            WAKE_ITERATIONS of the loop later:
            [A] is handed over            ---->   BEGIN, statement of A, COMMIT
     1 ms   B calls run(), and waits                 |
     2 ms   C calls run(), and waits                 | fsync
     4 ms   D calls run(), and waits                 |
     5 ms   run() returns to A            <----   A is durable
            GATHER_ITERATIONS of the loop later:
            [B, C, D] is handed over      ---->   BEGIN, statements of B, C and D, COMMIT
                                                     | fsync
    10 ms   run() returns to B, C and D   <----   B, C and D are durable

If the statement of C raises an error, the transaction is rolled back. Then B, C and D run again,
each in a transaction of its own, so that only C gets the error. There are two exceptions. If every
call would meet the same error, for example because the file is locked, B, C and D all get it at
once. And a QueueError before the first write, such as TaskNotFound, is just the result of C.
"""

import asyncio
import contextlib
import queue
import sqlite3
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from afterward.engines.sqlite.damage_check import is_damage
from afterward.engines.sqlite.database_file import drop_cached_wal
from afterward.errors import (
    CommitUnknown,
    DiskFull,
    QueueDamaged,
    QueueError,
    QueueUnavailable,
)

# One statement handles up to this many items. Few statements are better, because each one releases
# Python's global interpreter lock, and may wait for it again while the event loop is busy. But the
# number has a limit, because the SQL text for each number of items stays in a cache.
CHUNK_SIZE = 100

# Wait this many loop iterations before the next commit. Callers woken by the last commit then have
# time to queue their next operation, and it joins the next transaction. For example, a worker that
# has written the end of a task claims its next task.
GATHER_ITERATIONS = 4

# Wait this many loop iterations before the first commit after a rest. A new task wakes the idle
# worker of this process. In the seventh iteration, the worker calls `run` for its claim:
#
#     1. the wait for new tasks ends
#     2. asyncio.wait notices this
#     3. the claim loop cancels its other wait
#     4. the other wait ends
#     5. asyncio.gather notices this
#     6. the claim loop starts an asyncio task for the claim
#     7. this asyncio task calls `run`
#
# So the claim joins the commit of the task, and the task starts after one fsync instead of two. An
# iteration of an idle loop takes a few microseconds.
WAKE_ITERATIONS = 8

_NOT_RUNNING = "The queue is not running."
CLOSE_SECONDS = 3.0  # to wait for the last commit, and again for the connection to close

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")
Row = tuple[Any, ...]

BulkOperation = Callable[[sqlite3.Connection, Sequence[ItemT]], Sequence[ResultT]]
"""Does the same for each of several items, and returns a result for each item.

It executes one statement for up to CHUNK_SIZE items. It may be called twice, if another operation
of its group fails, so it has no effect outside of the connection.
"""


@dataclass(slots=True)
class _Call:
    """A call of `run` or `run_merged` that waits for its result."""

    operation: BulkOperation[Any, Any]
    item: Any
    future: "asyncio.Future[Any]"
    is_mergeable: bool  # whether `operation` is one statement, which other calls may share


@dataclass(frozen=True, slots=True)
class _Refusal:
    """The result of an operation that raised a QueueError and wrote nothing."""

    error: QueueError


_Result = tuple["asyncio.Future[Any]", Any, BaseException | None]


class GroupCommit:
    """Runs operations on one connection, which belongs to one thread, in shared transactions.

    `connect` opens the connection in autocommit mode. `report_damage` gets an error of an operation
    that has met a damaged page. Both are called in the thread. With `reads_only`, the operations
    write nothing.
    """

    def __init__(
        self,
        connect: Callable[[], sqlite3.Connection],
        report_damage: Callable[[Exception], None],
        *,
        reads_only: bool = False,
    ) -> None:
        self._connect = connect
        self._report_damage = report_damage
        self._begin = "BEGIN" if reads_only else "BEGIN IMMEDIATE"
        self._thread_name = "queue-searches" if reads_only else "queue-commits"
        self._waiting: list[_Call] = []
        self._committing = False  # True from the first call of a group to its results
        self._is_open = False
        self._groups: queue.SimpleQueue[list[_Call]]
        self._thread: threading.Thread
        self._opened: asyncio.Future[None]

    async def start(self) -> None:
        """Start the thread, and open the connection. Raises the error of `connect`.

        If this is cancelled, the thread closes the connection as soon as it is open, and ends.
        """
        self._loop = asyncio.get_running_loop()
        self._opened = self._loop.create_future()
        self._waiting, self._committing = [], False
        self._groups = queue.SimpleQueue()
        self._thread = threading.Thread(
            target=self._commit_groups, name=self._thread_name, daemon=True
        )
        self._thread.start()
        try:
            await self._opened
        except BaseException:
            self._end_thread()
            await self._wait_for_thread()
            raise
        self._is_open = True

    async def stop(self) -> None:
        """Finish the operations that are waiting, and close the connection.

        If this takes longer than CLOSE_SECONDS, the disk hangs. Then the thread still waits for the
        disk, and `is_using_file` stays True. It ends with the process at the latest.
        """
        # The groups are committed in order, so an empty operation ends after all others.
        last = asyncio.ensure_future(self.run(lambda _: None))
        try:
            ended, _ = await asyncio.wait([last], timeout=CLOSE_SECONDS)
        finally:
            self._end_thread()
            last.cancel()
        await asyncio.gather(last, return_exceptions=True)
        if ended:
            await self._wait_for_thread()

    @property
    def is_using_file(self) -> bool:
        """Whether the thread may still read or write the database."""
        return self._thread.is_alive()

    def _end_thread(self) -> None:
        """Let the thread end after the groups that it was given."""
        self._is_open = False
        self._groups.put([])

    async def _wait_for_thread(self) -> None:
        await asyncio.to_thread(self._thread.join, CLOSE_SECONDS)

    async def run(self, operation: Callable[[sqlite3.Connection], ResultT]) -> ResultT:
        """Run an operation, and return its result when its changes are durable.

        If another operation of the group fails, this one is rolled back and called again. So it
        must be repeatable, and have no effect outside of the connection.
        """

        # Each call of `run` makes a new function, so `_commit` never merges two of them.
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
            raise QueueUnavailable(_NOT_RUNNING)
        future: asyncio.Future[ResultT] = self._loop.create_future()
        self._waiting.append(_Call(operation, item, future, is_mergeable))
        # While a commit is under way, `_deliver` starts the next one.
        if not self._committing:
            self._committing = True
            self._hand_over(after=WAKE_ITERATIONS)
        return await future

    def _hand_over(self, after: int = 0) -> None:
        """Give the waiting calls to the thread as a group, after some loop iterations."""
        if after:
            self._loop.call_soon(self._hand_over, after - 1)
            return
        group, self._waiting = self._waiting, []
        if self._is_open:
            self._groups.put(group)
        else:  # it stopped a moment ago, and the thread takes no more groups
            error = QueueUnavailable(_NOT_RUNNING)
            _resolve_futures([(call.future, None, error) for call in group])

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
            self._call_in_loop(_resolve_futures, [(self._opened, None, error)])
            return
        self._call_in_loop(_resolve_futures, [(self._opened, None, None)])
        while group := self._groups.get():
            self._call_in_loop(self._deliver, self._commit(connection, group))
        connection.close()

    def _call_in_loop(
        self, deliver: Callable[[list[_Result]], None], results: list[_Result]
    ) -> None:
        # The loop is closed if the disk hung during a stop or a start. Then no caller waits.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(deliver, results)

    def _commit(self, connection: sqlite3.Connection, group: list[_Call]) -> list[_Result]:
        """Run a group in one transaction. If a call fails, run each in a transaction of its own.

        Returns the results of the group, which may be errors.
        """
        # 1. Merge calls of the same bulk operation. For example, 3 insertions, 2 settlements and 1
        #    query become 3 operations, with 3, 2 and 1 items.
        merged: dict[BulkOperation[Any, Any], list[_Call]] = {}
        for call in group:
            merged.setdefault(call.operation, []).append(call)

        # 2. A single statement needs no BEGIN and COMMIT, because SQLite commits it by itself.
        is_one_statement = len(merged) == 1 and group[0].is_mergeable and len(group) <= CHUNK_SIZE
        # The operations whose changes may be on the disk if an error follows.
        may_be_written = set(merged) if is_one_statement else set()
        writers: set[BulkOperation[Any, Any]] = set()
        results: list[_Result] = []
        try:
            # 3. Begin. If an earlier ROLLBACK failed, its transaction is still open: end it first,
            #    because no statement of this group may join it.
            _roll_back(connection)
            if not is_one_statement:
                connection.execute(self._begin)

            # 4. Run the operations, and collect the result of each call.
            for operation, calls in merged.items():
                changes = connection.total_changes
                values = operation(connection, [call.item for call in calls])
                pairs = zip(calls, values, strict=True)
                results += [(call.future, value, None) for call, value in pairs]
                if connection.total_changes != changes:
                    writers.add(operation)

            # 5. Commit: one fsync for the whole group.
            if not is_one_statement:
                may_be_written = writers
                connection.execute("COMMIT")
        except Exception as error:  # noqa: BLE001 - each caller gets it, or its own
            # 6. Undo everything. An error of ROLLBACK must not end the thread: step 3 of the next
            #    group tries again.
            with contextlib.suppress(sqlite3.Error):
                _roll_back(connection)
            if _is_disk_error(error):
                drop_cached_wal(connection)
            if is_damage(error):
                self._report_damage(error)

            # 7. Find the call that failed: run each alone. This does not help if every call would
            #    meet the same error, for example a locked file: then all get this error.
            if len(group) > 1 and not _hits_every_call(error):
                return [result for call in group for result in self._commit(connection, [call])]
            return [
                (call.future, None, _translate(error, call.operation in may_be_written))
                for call in group
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


def _hits_every_call(error: Exception) -> bool:
    """Tell whether every call would meet this error.

    A full disk is an exception, because operations that only read still succeed. So is a damaged
    page, because operations on other pages succeed.
    """
    return _is_environment_error(error) and not _is_full(error) and not is_damage(error)


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


def _translate(error: Exception, may_be_written: bool) -> Exception:
    """Return the error for a caller. `may_be_written` tells whether its commit had begun."""
    if not _is_environment_error(error):
        return error
    translated: QueueUnavailable
    if _is_full(error):
        translated = DiskFull()
    elif is_damage(error):
        translated = QueueDamaged()
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
