"""One connection in one thread: what arrives while a commit is under way shares the next one.

A commit waits for the disk (fsync), which costs the same for one task as for sixty. So operations
queue up here, and each transaction takes all that have come in: under load durability costs each
request almost nothing, and an idle service answers as fast as the disk does.
"""

import asyncio
import contextlib
import queue
import sqlite3
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from app.queue.errors import QueueFull, QueueUnavailable
from app.queue.sqlite_file import forget_cached_log

ResultT = TypeVar("ResultT")
Row = tuple[Any, ...]


@dataclass(slots=True)
class _Insert:
    """Rows for one table; the inserts of a group become a single statement."""

    rows: Sequence[Row]
    done: "asyncio.Future[None]"


@dataclass(slots=True)
class _Operation(Generic[ResultT]):
    """Anything else: runs in the transaction, and sees what the inserts wrote."""

    run: Callable[[sqlite3.Connection], ResultT]
    done: "asyncio.Future[ResultT]"


_Job = _Insert | _Operation[Any]
_Answer = tuple["asyncio.Future[Any]", Any, BaseException | None]


class GroupCommit:
    """Runs operations on a connection, in transactions that they share.

    `connect` opens the connection, in autocommit mode; `insert` writes the rows of all inserts of
    a group at once.
    """

    def __init__(
        self,
        connect: Callable[[], sqlite3.Connection],
        insert: Callable[[sqlite3.Connection, list[Row]], None],
    ) -> None:
        self._connect = connect
        self._insert = insert
        self._waiting: list[_Job] = []
        self._committing = False
        self._groups: queue.SimpleQueue[list[_Job]] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._serve, name="queue-commits", daemon=True)
        self._opened: asyncio.Future[None]

    async def start(self) -> None:
        """Open the connection; raises what `connect` raised."""
        self._loop = asyncio.get_running_loop()
        self._opened = self._loop.create_future()
        self._thread.start()
        await self._opened

    async def stop(self) -> None:
        """Finish what was asked for, and close the connection."""
        with contextlib.suppress(QueueUnavailable):
            await self.run(lambda _: None)
        self._groups.put([])
        await asyncio.to_thread(self._thread.join)

    async def insert(self, rows: Sequence[Row]) -> None:
        """Write rows; they are on disk when this returns."""
        done: asyncio.Future[None] = self._loop.create_future()
        self._add(_Insert(rows, done))
        await done

    async def run(self, operation: Callable[[sqlite3.Connection], ResultT]) -> ResultT:
        """Run an operation; what it wrote is on disk when this returns."""
        done: asyncio.Future[ResultT] = self._loop.create_future()
        self._add(_Operation(operation, done))
        return await done

    def _add(self, job: _Job) -> None:
        self._waiting.append(job)
        if not self._committing:
            self._committing = True
            # At the end of this turn of the loop, so that all the requests of a turn come along.
            self._loop.call_soon(self._hand_over)

    def _hand_over(self) -> None:
        group, self._waiting = self._waiting, []
        self._groups.put(group)

    def _settle(self, answers: list[_Answer]) -> None:
        """Give a group its answers, and hand over what has come in meanwhile."""
        _resolve(answers)
        self._committing = bool(self._waiting)
        if self._waiting:
            self._hand_over()

    def _serve(self) -> None:
        """Commit group after group, until an empty one; this is the thread."""
        try:
            connection = self._connect()
        except Exception as error:  # noqa: BLE001 - whatever it is, start() raises it
            self._loop.call_soon_threadsafe(self._opened.set_exception, error)
            return
        self._loop.call_soon_threadsafe(self._opened.set_result, None)
        while group := self._groups.get():
            self._loop.call_soon_threadsafe(self._settle, self._commit(connection, group))
        connection.close()

    def _commit(self, connection: sqlite3.Connection, group: list[_Job]) -> list[_Answer]:
        """Run a group in one transaction. If a member raises, each is run again in its own."""
        try:
            rows = [row for job in group if isinstance(job, _Insert) for row in job.rows]
            if not any(isinstance(job, _Operation) for job in group):
                self._insert(connection, rows)  # one statement is a transaction of its own
                return [(job.done, None, None) for job in group]
            connection.execute("BEGIN IMMEDIATE")
            if rows:
                self._insert(connection, rows)
            answers: list[_Answer] = [
                (job.done, job.run(connection) if isinstance(job, _Operation) else None, None)
                for job in group
            ]
            connection.execute("COMMIT")
        except Exception as error:  # noqa: BLE001 - each caller gets its own
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            if _disk_fails(error):
                forget_cached_log(connection)
            if len(group) > 1 and not _refuses_all(error):
                return [answer for job in group for answer in self._commit(connection, [job])]
            return [(job.done, None, _translated(error)) for job in group]
        return answers


def _refuses_all(error: Exception) -> bool:
    """Whether the database itself is in trouble, so that every member would meet the same.

    A full disk is no such trouble: whoever only reads is served.
    """
    return isinstance(error, sqlite3.OperationalError) and not _is_full(error)


def _is_full(error: Exception) -> bool:
    return _code(error) == sqlite3.SQLITE_FULL


def _disk_fails(error: Exception) -> bool:
    return _code(error) & 0xFF == sqlite3.SQLITE_IOERR  # the rest says in which call


def _code(error: Exception) -> int:
    # An error of the module itself, such as a wrong binding, has no code.
    return getattr(error, "sqlite_errorcode", sqlite3.SQLITE_OK)


def _translated(error: Exception) -> Exception:
    if not isinstance(error, sqlite3.Error):
        return error
    translated = QueueFull() if _is_full(error) else QueueUnavailable()
    translated.__cause__ = error
    return translated


def _resolve(answers: list[_Answer]) -> None:
    for future, result, error in answers:
        if future.done():  # its caller was cancelled
            continue
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)
