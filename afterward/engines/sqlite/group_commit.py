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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from afterward.engines.sqlite.database_file import forget_cached_log
from afterward.errors import CommitUnknown, QueueError, QueueFull, QueueUnavailable

# Of what many ask for alike, so much goes into one statement: each statement gives up Python's
# lock, and may wait for it again while the event loop is busy. A statement of each length is kept.
LOT = 100

# Turns of the loop between a commit and the next: so what its answers lead to comes along. A worker
# asks for the next task when the end of one is written, and neither has to wait twice.
GATHER_TURNS = 4

CLOSE_SECONDS = 3.0  # for the last commit, and for the connection to close

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")
Row = tuple[Any, ...]

Do = Callable[[sqlite3.Connection, Sequence[ItemT]], Sequence[ResultT]]
"""Does the same for several items; gives a result for each. A LOT of them takes one statement."""


@dataclass(slots=True)
class _Job:
    do: Do[Any, Any]
    item: Any
    done: "asyncio.Future[Any]"
    is_shared: bool


@dataclass(frozen=True, slots=True)
class _Refusal:
    """The result of an operation that raised an error of the queue and wrote nothing."""

    error: QueueError


_Answer = tuple["asyncio.Future[Any]", Any, BaseException | None]


class GroupCommit:
    """Runs operations on a connection, in transactions that they share.

    `connect` opens the connection, in autocommit mode.
    """

    def __init__(self, connect: Callable[[], sqlite3.Connection]) -> None:
        self._connect = connect
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

    async def stop(self) -> bool:
        """Finish the operations that were asked for, and close the connection.

        Gives False if that takes longer than CLOSE_SECONDS, because the disk hangs. Then the thread
        still waits for the disk, and ends with the process at the latest.
        """
        last = asyncio.ensure_future(self.run(lambda _: None))
        ended, _ = await asyncio.wait([last], timeout=CLOSE_SECONDS)
        self._groups.put([])
        if not ended:
            last.cancel()
            return False
        with contextlib.suppress(QueueUnavailable):
            last.result()
        await asyncio.to_thread(self._thread.join, CLOSE_SECONDS)
        return not self._thread.is_alive()

    async def run(self, operation: Callable[[sqlite3.Connection], ResultT]) -> ResultT:
        """Run an operation; what it wrote is on disk when this returns."""

        def do(connection: sqlite3.Connection, _: Sequence[None]) -> list[ResultT | _Refusal]:
            changes = connection.total_changes
            try:
                return [operation(connection)]
            except QueueError as error:
                # Such as "there is no such task": an answer like any other, if nothing was written.
                # The error must not leave the transaction, which the other members share.
                if connection.total_changes != changes:
                    raise
                return [_Refusal(error)]

        result = await self._ask(do, None, is_shared=False)
        if isinstance(result, _Refusal):
            raise result.error
        return result

    async def share(self, do: Do[ItemT, ResultT], item: ItemT) -> ResultT:
        """Have something done for an item, together with the others for whom it is to be done."""
        return await self._ask(do, item, is_shared=True)

    async def _ask(self, do: Do[ItemT, ResultT], item: ItemT, *, is_shared: bool) -> ResultT:
        done: asyncio.Future[ResultT] = self._loop.create_future()
        self._waiting.append(_Job(do, item, done, is_shared))
        if not self._committing:
            self._committing = True
            # At the end of this turn of the loop, so that all the requests of a turn come along.
            self._loop.call_soon(self._hand_over)
        return await done

    def _hand_over(self, after: int = 0) -> None:
        """Have what is waiting committed, so many turns of the loop later."""
        if after:
            self._loop.call_soon(self._hand_over, after - 1)
        else:
            group, self._waiting = self._waiting, []
            self._groups.put(group)

    def _settle(self, answers: list[_Answer]) -> None:
        """Give a group its answers, and hand over what has come in meanwhile."""
        _resolve(answers)
        self._committing = bool(self._waiting)
        if self._waiting:
            self._hand_over(after=GATHER_TURNS)

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
        together: dict[Do[Any, Any], list[_Job]] = {}
        for job in group:
            together.setdefault(job.do, []).append(job)
        # A single statement is a transaction of its own.
        is_one_statement = len(together) == 1 and group[0].is_shared and len(group) <= LOT
        may_be_written = is_one_statement
        answers: list[_Answer] = []
        try:
            # If an earlier ROLLBACK has failed: no statement must join the transaction left open.
            _roll_back(connection)
            if not is_one_statement:
                connection.execute("BEGIN IMMEDIATE")
            for do, jobs in together.items():
                results = do(connection, [job.item for job in jobs])
                pairs = zip(jobs, results, strict=True)
                answers += [(job.done, result, None) for job, result in pairs]
            if not is_one_statement:
                may_be_written = True
                connection.execute("COMMIT")
        except Exception as error:  # noqa: BLE001 - each caller gets its own
            # An error of the rollback must not end the thread: the next group tries again.
            with contextlib.suppress(sqlite3.Error):
                _roll_back(connection)
            if _disk_fails(error):
                forget_cached_log(connection)
            if len(group) > 1 and not _refuses_all(error):
                return [answer for job in group for answer in self._commit(connection, [job])]
            return [(job.done, None, _translated(error, may_be_written)) for job in group]
        return answers


def _roll_back(connection: sqlite3.Connection) -> None:
    # SQLite has rolled back by itself after some errors (https://sqlite.org/lang_transaction.html).
    if connection.in_transaction:
        connection.execute("ROLLBACK")


def in_lots(items: Sequence[ItemT]) -> Iterator[Sequence[ItemT]]:
    """The items, at most LOT at a time."""
    for first in range(0, len(items), LOT):
        yield items[first : first + LOT]


def _refuses_all(error: Exception) -> bool:
    """Tell whether the machine is in trouble, so that every member would meet the same error.

    A full disk is no such trouble, because operations that only read still succeed.
    """
    return _is_of_the_machine(error) and not _is_full(error)


def _is_full(error: Exception) -> bool:
    return _code(error) == sqlite3.SQLITE_FULL


def _disk_fails(error: Exception) -> bool:
    return _code(error) & 0xFF == sqlite3.SQLITE_IOERR  # the rest says in which call


def _code(error: Exception) -> int:
    # An error of the module itself, such as a wrong binding, has no code.
    return getattr(error, "sqlite_errorcode", sqlite3.SQLITE_OK)


# Errors of the machine: a locked or a damaged file, a disk that is full, fails or only reads. All
# others, such as a wrong column, are mistakes in our statements, which no waiting mends.
_MACHINE = {
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


def _is_of_the_machine(error: Exception) -> bool:
    return isinstance(error, sqlite3.Error) and _code(error) & 0xFF in _MACHINE


def _translated(error: Exception, may_be_written: bool) -> Exception:
    """Give the error to raise for a member of a transaction, whose commit may have begun."""
    if not _is_of_the_machine(error):
        return error
    translated: QueueUnavailable
    if _is_full(error):
        translated = QueueFull()
    elif may_be_written and _disk_fails(error):
        # A log that could not be synced may be on the disk all the same, and be read after a crash.
        translated = CommitUnknown()
    else:
        translated = QueueUnavailable()
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
