"""Opens the database file: locks it against a second process, checks it, and makes its tables."""

import contextlib
import fcntl
import os
import sqlite3
import time
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

from afterward.engines.sqlite import damage_check
from afterward.errors import CannotStart

SCHEMA_VERSION = 1
# "AFTW" in ASCII: marks the files of this project. Files from before the first release lack it,
# and have other tables.
APPLICATION_ID = 0x41465457
OLDEST_SQLITE = (3, 37)  # has STRICT tables
LOCKED_SECONDS = 1.0  # how long a statement waits while another program locks the database


def check_version() -> None:
    """Raise CannotStart if this Python has an older SQLite than the tables need."""
    if sqlite3.sqlite_version_info < OLDEST_SQLITE:
        oldest = ".".join(map(str, OLDEST_SQLITE))
        raise CannotStart(
            f"SQLite {oldest} or newer is needed, and this Python has {sqlite3.sqlite_version}"
        )


def lock(path: Path) -> int:
    """Lock the file `<database>.lock` for this process, and return its descriptor.

    Raises CannotStart if another process holds the lock. Only one process may use the database,
    because SQLite before 3.51.3 can corrupt a WAL that two connections write and checkpoint at the
    same time. Besides, group commit and the wake-up of workers only work within a process.
    """
    # Resolve symbolic links, so that all names of a database have the same lock.
    lock_path = Path(os.path.realpath(path) + ".lock")
    try:
        _make_directory(lock_path.parent)
        descriptor = os.open(lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise CannotStart(f"{lock_path} cannot be opened: {error.strerror}.") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        owner = os.pread(descriptor, 20, 0).decode("ascii", "replace").strip()
        os.close(descriptor)
        raise CannotStart(_explain_lock_error(path, lock_path, owner, error)) from error
    # The process number in the file is only for people and for error messages. If it cannot be
    # written, for example because the disk is full, this process has the lock nevertheless.
    with contextlib.suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"{os.getpid()}\n".encode())
    return descriptor


def _explain_lock_error(path: Path, lock_path: Path, owner: str, error: OSError) -> str:
    """Return the message for a lock that could not be taken; `owner` is the text in its file."""
    if not isinstance(error, BlockingIOError):
        return (
            f"{lock_path} cannot be locked: {error.strerror}. The file system has no locks, like "
            "NFS without its lock service: put the database on a local disk."
        )
    # Each container numbers its processes separately. So a process in another container may have
    # the same number as this process, and the number would mislead.
    is_known = owner.isdecimal() and int(owner) != os.getpid()
    process = f"process {owner}" if is_known else "another process"
    stop = f" Stop it with `kill {owner}`, or" if is_known else " Stop it, or"
    return (
        f"{path} is in use by {process}.{stop} use another file. SQLite serves one process; "
        "several need a postgresql:// URL."
    )


def _make_directory(directory: Path) -> None:
    """Make a directory and its parents, with access for the owner alone, and sync their names."""
    if directory.is_dir():
        return
    _make_directory(directory.parent)
    directory.mkdir(mode=0o700, exist_ok=True)
    parent = os.open(directory.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        # Some file systems cannot sync a directory. SQLite syncs the database itself.
        with contextlib.suppress(OSError):
            os.fsync(parent)
    finally:
        os.close(parent)


def check_database(path: Path) -> bool:
    """Check the file, if there is one, for START_SECONDS. Return False if time was too short.

    Raises CannotStart, and does not change the file, if it is damaged, if it belongs to another
    program, or if a newer version has written it.
    """
    # If the disk failed under an earlier process, the last pages of the WAL may only be in the page
    # cache (see drop_cached_wal). Transactions that are appended behind such pages would be lost
    # together with them, although they are synced. So drop the cached pages, and read the WAL from
    # the disk. The database itself may stay in the cache: SQLite keeps the WAL until the pages that
    # it has copied from there are synced, and copies them again after a failure.
    _drop_from_cache(beside(path, "-wal"))
    with _refusing(path):
        return not path.exists() or _check(path)


def open_database(path: Path) -> sqlite3.Connection:
    """Open the database in autocommit mode, for use by one thread. Makes the file if necessary.

    Raises CannotStart.
    """
    with _refusing(path), contextlib.ExitStack() as after_an_error:
        if not path.exists():
            # SQLite gives its -wal and -shm files the mode of the database.
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        # One thread uses the connection. That is not checked, so that tests may look at it, too.
        connection = sqlite3.connect(
            path, timeout=LOCKED_SECONDS, isolation_level=None, check_same_thread=False
        )
        after_an_error.callback(connection.close)
        _prepare(connection)
        after_an_error.pop_all()
        return connection


def open_for_searches(path: Path) -> sqlite3.Connection:
    """Open the database for a thread that only reads, beside the connection of open_database.

    A read-only connection writes no WAL and makes no checkpoint, so it is outside the WAL-reset bug
    (see `lock`). Raises CannotStart.
    """
    with _refusing(path):
        return sqlite3.connect(
            f"{path.absolute().as_uri()}?mode=ro",
            uri=True,
            timeout=LOCKED_SECONDS,
            isolation_level=None,
            check_same_thread=False,
        )


@contextlib.contextmanager
def _refusing(path: Path) -> Iterator[None]:
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        raise CannotStart(
            f"{path} cannot be the queue's database: {error}. It was left as it is."
        ) from error


def drop_cached_wal(connection: sqlite3.Connection) -> None:
    """Drop the WAL from the page cache, so that it is read from the disk. Call after a disk error.

    After a failed fsync, Linux marks the pages as clean, although they are not on the disk
    (https://lwn.net/Articles/752063/). Even if the same data is written and synced again, ext4 may
    not write these pages. So they must not be in the cache when the next transaction is written.
    """
    _, _, path = connection.execute("PRAGMA database_list").fetchone()
    _drop_from_cache(beside(Path(path), "-wal"))


def _drop_from_cache(wal: Path) -> None:
    # When a process closes a file, it loses all POSIX locks that it has on the file. This does no
    # harm here, because SQLite has no locks on a WAL.
    with contextlib.suppress(OSError, AttributeError):  # the file is missing; or this is macOS
        descriptor = os.open(wal, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def beside(path: Path, suffix: str) -> Path:
    """Return the path of SQLite's WAL ("-wal") or journal ("-journal").

    SQLite puts it beside the file that a symbolic link leads to.
    """
    return Path(os.path.realpath(path) + suffix)


def _check(path: Path) -> bool:
    """Raise sqlite3.DatabaseError if the file is damaged, foreign or newer than this version.

    Returns False if START_SECONDS were too short to look for damage in all of it. The check changes
    no file and makes none beside the database, unless a crash has left work to do.
    """
    journal, wal = beside(path, "-journal"), beside(path, "-wal")
    # A process that crashed while it made the file has left a journal, and SQLite must write to
    # roll it back. A process that crashed later has left transactions in the WAL, and SQLite reads
    # them there. If there is neither, "immutable" keeps SQLite from making files of its own.
    mode = "rw" if _has_content(journal) else "ro" if _has_content(wal) else "ro&immutable=1"
    uri = f"{path.absolute().as_uri()}?mode={mode}"
    with contextlib.closing(sqlite3.connect(uri, uri=True)) as db:
        ends_at = time.monotonic() + damage_check.START_SECONDS
        is_complete = damage_check.check_pages(db, lambda: time.monotonic() > ends_at)
        (page_size,) = db.execute("PRAGMA page_size").fetchone()
        # If the end of the last page is missing, SQLite reads zeros there, and quick_check passes.
        if path.stat().st_size % page_size and mode.endswith("immutable=1"):
            raise sqlite3.DatabaseError("it was cut short")
        (version,) = db.execute("PRAGMA user_version").fetchone()
        names = {name for (name,) in db.execute("SELECT name FROM sqlite_schema")}
        (application,) = db.execute("PRAGMA application_id").fetchone()
        if names and application != APPLICATION_ID:
            if {"tasks", "tasks_due", "answers"} <= names:
                raise sqlite3.DatabaseError(
                    "its tables are older than the first release. Move it away, and start with a "
                    "new one"
                )
            raise sqlite3.DatabaseError("it belongs to another program")
        if version > SCHEMA_VERSION:
            raise sqlite3.DatabaseError(f"it was written by a newer version (schema {version})")
    return is_complete


def _has_content(path: Path) -> bool:
    return path.exists() and path.stat().st_size > 0


def _prepare(connection: sqlite3.Connection) -> None:
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")  # fsync before COMMIT returns
    # A checkpoint costs further fsyncs. A WAL of 4,000 pages, instead of 1,000, makes it rarer.
    connection.execute("PRAGMA wal_autocheckpoint = 4000")
    # During a check in the background, the WAL grows beyond these 16 MB. Then give the space above
    # 64 MB back.
    connection.execute("PRAGMA journal_size_limit = 67108864")
    connection.execute("PRAGMA cache_size = -16000")
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version == 0:
        script = files("afterward.engines.sqlite").joinpath("schema.sql").read_text()
        connection.executescript(
            f"BEGIN IMMEDIATE; {script}; PRAGMA application_id = {APPLICATION_ID}; "
            f"PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;"
        )
    # This process has the lock, so every lease belongs to a process that has ended. Expire them.
    connection.execute("UPDATE tasks SET lease_expires_at = 0 WHERE status = 'running'")
