"""Checks the database file for damage: for half a second at the start, then in the background.

`PRAGMA quick_check` reads the whole file. For a million finished tasks (460 MB) this takes 0.5 s if
the file is in the page cache, and 6 s and more if it comes from the disk, for example after a
restart of the machine. So the start gives the check START_SECONDS. If it does not end by then, a
BackgroundCheck repeats it while the service runs.
"""

import sqlite3
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import structlog

START_SECONDS = 0.5  # a start waits this long for the check
FIRST_SECONDS = 1.0  # the time limit of the first check in the background
LONGEST_SECONDS = 3600.0
LONGEST_WAL_GROWTH = 256 * 1024 * 1024  # bytes, during one check
WATCH_SECONDS = 0.02  # between two looks at a running check
STOP_SECONDS = 1.0  # to wait for the end of an interrupted check; it takes milliseconds

log = structlog.get_logger(__name__)


def is_damage(error: BaseException) -> bool:
    """Tell whether SQLite has found that the file is damaged, or that it is no database."""
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_OK)
    return code & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


def check_pages(connection: sqlite3.Connection, is_over: Callable[[], bool]) -> bool:
    """Check all pages of the database. Return False if the check was interrupted before its end.

    Another thread calls `is_over` every WATCH_SECONDS, and interrupts the check if it returns True.
    A progress handler could not: SQLite before 3.41 calls none while it checks the pages. Raises
    sqlite3.DatabaseError if the file is damaged; see `is_damage`.
    """
    ended, was_interrupted = threading.Event(), threading.Event()

    def watch() -> None:
        while not ended.wait(WATCH_SECONDS):
            if is_over():
                was_interrupted.set()
                connection.interrupt()

    watcher = threading.Thread(target=watch, name="database-check-watch", daemon=True)
    watcher.start()
    try:
        (verdict,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    except sqlite3.OperationalError:
        if not was_interrupted.is_set():
            raise
    finally:
        ended.set()
        watcher.join()
    # The verdict of an interrupted check means nothing: SQLite may report that the pages that it
    # has not reached yet are in no table.
    if was_interrupted.is_set():
        return False
    if verdict != "ok":
        error = sqlite3.DatabaseError(f"it is damaged ({verdict.splitlines()[-1]})")
        error.sqlite_errorcode = sqlite3.SQLITE_CORRUPT
        raise error
    return True


class BackgroundCheck:
    """Checks the file while the service runs; calls `report_damage`, in its thread, if it is damaged.

    A check is one read transaction, and until it ends SQLite cannot start the WAL again from its
    beginning. So the WAL grows with each commit meanwhile. To limit this, a check is interrupted
    after 1 s, the next one after 2 s, then 4 s and so on until one reaches the end of the file, with
    a pause of the same length before each. Checkpoints catch up in the pauses. The pages that one
    check has read are in the page cache for the next one, which reads them twelve times faster. A
    check is also interrupted when the WAL has grown by LONGEST_WAL_GROWTH.

    SQLite before 3.51.3 can corrupt a WAL if two connections write or checkpoint at the same time
    (https://sqlite.org/wal.html, "The WAL-Reset Bug"). The connection of this check is read-only, so
    it does neither of them, not even when it is closed.
    """

    def __init__(self, path: Path, report_damage: Callable[[sqlite3.Error], None]) -> None:
        self._path = path
        self._wal = path.with_name(path.name + "-wal")
        self._report_damage = report_damage
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="database-check", daemon=True)

    def start(self) -> None:
        """Start the thread of the check."""
        self._thread.start()

    def stop(self) -> None:
        """Interrupt the check, and wait up to STOP_SECONDS for its end.

        If the disk hangs, the thread waits for it longer. It ends with the process at the latest.
        """
        self._stopping.set()
        self._thread.join(STOP_SECONDS)

    def _run(self) -> None:
        began, seconds = time.monotonic(), FIRST_SECONDS
        while not self._stopping.wait(seconds):
            try:
                if self._check(at_most=seconds):
                    log.info("database checked", seconds=round(time.monotonic() - began, 1))
                    return
            except sqlite3.Error as error:
                if is_damage(error):
                    self._report_damage(error)
                    return
                log.warning("database check put off", error=str(error))
            seconds = min(2 * seconds, LONGEST_SECONDS)

    def _check(self, *, at_most: float) -> bool:
        """Check the file once, for up to `at_most` seconds. Return whether all of it was checked."""
        ends_at = time.monotonic() + at_most
        largest_wal = self._wal.stat().st_size + LONGEST_WAL_GROWTH

        def is_over() -> bool:
            return (
                self._stopping.is_set()
                or time.monotonic() > ends_at
                or self._wal.stat().st_size > largest_wal
            )

        uri = f"{self._path.absolute().as_uri()}?mode=ro"
        with closing(sqlite3.connect(uri, uri=True, check_same_thread=False)) as connection:
            return check_pages(connection, is_over)
