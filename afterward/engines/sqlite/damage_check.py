"""Checks the database file for damage: for 0.3 s at the start, then in the background.

`PRAGMA quick_check` reads the whole file. For a million finished tasks (460 MB) this takes 0.5 s if
the file is in the page cache, and 6 s and more if it comes from the disk, for example after a
restart of the machine. So the start gives the check START_SECONDS. If it does not end by then, a
BackgroundCheck repeats it while the service runs.
"""

import os
import sqlite3
import threading
import time
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path

import structlog

QUICK_CHECK = "PRAGMA quick_check(1)"  # returns "ok", or a description of the first damage
START_SECONDS = 0.3  # the time limit of the check at the start
FIRST_SECONDS = 1.0  # the time limit of the first check in the background
LONGEST_SECONDS = 3600.0
LONGEST_WAL_GROWTH = 256 * 1024 * 1024  # bytes, during one check
WATCH_SECONDS = 0.02  # between two looks at a running check
STOP_SECONDS = 1.0  # to wait for an interrupted check, which ends within milliseconds
NICENESS = 10  # of the thread: see nice(1)

log = structlog.get_logger(__name__)


def is_damage(error: BaseException) -> bool:
    """Tell whether SQLite has found that the file is damaged, or that it is no database."""
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_OK)
    return code & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


def check_pages(connection: sqlite3.Connection, is_over: Callable[[], bool]) -> bool:
    """Check the whole database, but interrupt the check when `is_over` returns True.

    Returns False if the check was interrupted. `is_over` is called every WATCH_SECONDS, in another
    thread. A progress handler would not do, because SQLite before 3.41 calls none while it checks
    pages. Raises sqlite3.DatabaseError if the file is damaged: see `is_damage`.
    """
    ended, was_interrupted = threading.Event(), threading.Event()

    def watch() -> None:
        while not is_over():
            if ended.wait(WATCH_SECONDS):
                return
        was_interrupted.set()
        # Repeatedly, because an interrupt has no effect before the statement begins.
        while not ended.wait(WATCH_SECONDS):
            connection.interrupt()

    watcher = threading.Thread(target=watch, name="database-check-watch", daemon=True)
    watcher.start()
    try:
        (verdict,) = connection.execute(QUICK_CHECK).fetchone()
    except sqlite3.OperationalError:
        if not was_interrupted.is_set():
            raise
    finally:
        ended.set()
        watcher.join()
    # The verdict of an interrupted check is worthless: SQLite may take pages for lost that it has
    # not reached.
    if was_interrupted.is_set():
        return False
    if verdict != "ok":
        error = sqlite3.DatabaseError(f"it is damaged ({verdict.splitlines()[-1]})")
        error.sqlite_errorcode = sqlite3.SQLITE_CORRUPT
        raise error
    return True


class BackgroundCheck:
    """Checks the file while the service runs. Calls `report_damage` in its thread.

    A check is one read transaction, and while it lasts SQLite cannot start again at the beginning
    of the WAL. So the WAL grows with each commit. To limit this, a check is interrupted after 1 s,
    the next one after 2 s, then 4 s and so on, until a check reaches the end of the file. Before
    each there is a pause of the same length, in which checkpoints catch up. Little work is done
    twice: the pages that one check has read are in the page cache for the next, and the check of
    a page in the cache takes a twelfth of the time. A check is also interrupted when the WAL has
    grown by LONGEST_WAL_GROWTH.

    SQLite before 3.51.3 can corrupt a WAL that two connections write or checkpoint at the same time
    (https://sqlite.org/wal.html, "The WAL-Reset Bug"). The connection of a check does neither, not
    even when it is closed, because it is opened read-only.
    """

    def __init__(self, path: Path, report_damage: Callable[[Exception], None]) -> None:
        self._path = path
        # SQLite puts the WAL beside the file that a symbolic link leads to.
        self._wal = Path(os.path.realpath(path) + "-wal")
        self._report_damage = report_damage
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="database-check", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Interrupt the check, and wait up to STOP_SECONDS for its end.

        While the disk hangs, the thread waits for the disk. It ends with the process at the latest.
        """
        self._stopping.set()
        self._thread.join(STOP_SECONDS)

    def _run(self) -> None:
        _lower_priority()
        began, seconds = time.monotonic(), FIRST_SECONDS
        while not self._stopping.wait(seconds):
            try:
                is_checked = self._check(at_most=seconds)
            except Exception as error:  # noqa: BLE001 -- the next check tries again
                if is_damage(error):
                    self._report_damage(error)
                    return
                with suppress(Exception):  # the disk of the log may be full
                    log.warning("database check put off", error=str(error))
            else:
                if is_checked:
                    with suppress(Exception):
                        log.info("database checked", seconds=round(time.monotonic() - began, 1))
                    return
            seconds = min(2 * seconds, LONGEST_SECONDS)

    def _check(self, *, at_most: float) -> bool:
        """Check the file for up to `at_most` seconds. Return False if it was interrupted."""
        ends_at = time.monotonic() + at_most
        largest_wal = self._wal_size() + LONGEST_WAL_GROWTH

        def is_over() -> bool:
            return (
                self._stopping.is_set()
                or time.monotonic() > ends_at
                or self._wal_size() > largest_wal
            )

        uri = f"{self._path.absolute().as_uri()}?mode=ro"
        with closing(sqlite3.connect(uri, uri=True, check_same_thread=False)) as connection:
            return check_pages(connection, is_over)

    def _wal_size(self) -> int:
        try:
            return self._wal.stat().st_size
        except OSError:  # the look at a running check must not end it
            return 0


def _lower_priority() -> None:
    """Lower the priority of this thread, so that it hardly slows requests on a busy machine.

    Only Linux has priorities of threads. Elsewhere there is no process with the thread's number.
    """
    with suppress(OSError, OverflowError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
