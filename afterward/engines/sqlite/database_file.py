"""Opens the embedded engine's file: locked for one process, checked, and prepared."""

import contextlib
import fcntl
import os
import sqlite3
from importlib.resources import files
from pathlib import Path

from afterward.errors import CannotStart

SCHEMA_VERSION = 1
# Marks our files. Before there was a release, they had no mark, and other tables.
APPLICATION_ID = 0x41465457
LOCKED_SECONDS = 1.0  # how long a statement waits for somebody else's lock on the file


def lock(path: Path) -> int:
    """Take the lock file beside the database for this process, or raise CannotStart.

    Only one process may use the database: SQLite before 3.51.3 can corrupt a WAL that two
    connections write and checkpoint at once, and wake-ups and group commit work in one process.
    """
    # Of the file itself: a link is only another name for it.
    lock_path = Path(os.path.realpath(path) + ".lock")
    try:
        _make_directory(lock_path.parent)
        lock = os.open(lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise CannotStart(f"{lock_path} cannot be opened: {error.strerror}.") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        owner = os.pread(lock, 20, 0).decode("ascii", "replace").strip()
        os.close(lock)
        raise CannotStart(_why_not_locked(path, lock_path, owner, error)) from error
    # The number is for people, and only the lock itself counts: a full disk stops no start.
    with contextlib.suppress(OSError):
        os.ftruncate(lock, 0)
        os.write(lock, f"{os.getpid()}\n".encode())
    return lock


def _why_not_locked(path: Path, lock_path: Path, owner: str, error: OSError) -> str:
    if not isinstance(error, BlockingIOError):
        return (
            f"{lock_path} cannot be locked: {error.strerror}. The file system has no locks, as NFS "
            "without its lock service: set QUEUE_URL to a file on a local disk."
        )
    # Another container counts its processes by itself: there, ours has the same number.
    is_known = owner.isdecimal() and int(owner) != os.getpid()
    process = f"process {owner}" if is_known else "another process"
    stop = f" Stop it with `kill {owner}`, or" if is_known else " Stop it, or"
    return (
        f"{path} is in use: the service already runs here, as {process}.{stop} set QUEUE_URL to "
        "another file. SQLite serves one process; several need QUEUE_URL=postgresql://…"
    )


def _make_directory(directory: Path) -> None:
    """Make a directory and its parents, private and durable: each name is synced to the disk."""
    if directory.is_dir():
        return
    _make_directory(directory.parent)
    directory.mkdir(mode=0o700, exist_ok=True)
    parent = os.open(directory.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        # Not every file system can sync a directory; the database itself is synced by SQLite.
        with contextlib.suppress(OSError):
            os.fsync(parent)
    finally:
        os.close(parent)


def open_database(path: Path) -> sqlite3.Connection:
    """Open the database, in autocommit mode, for use by one thread; it is made if it is missing.

    Raises CannotStart for a file that is damaged, foreign or newer, and leaves it as it is.
    """
    connection = None
    try:
        if path.exists():
            # What a process left that had seen the disk fail may stand in the cache alone: what
            # was added behind it, and synced, would be lost together with it.
            for file in (path, _wal(path)):
                _advise(file, "DONTNEED")
                _advise(file, "WILLNEED")  # all of it is read next: in one go
            _check(path)
        else:
            # SQLite gives its -wal and -shm files the mode of the database.
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        connection = sqlite3.connect(
            path, timeout=LOCKED_SECONDS, isolation_level=None, check_same_thread=False
        )
        _prepare(connection)
    except (sqlite3.Error, OSError) as error:
        if connection is not None:
            connection.close()
        raise CannotStart(
            f"{path} cannot be the queue's database: {error}. It was left as it is."
        ) from error
    return connection


def forget_cached_log(connection: sqlite3.Connection) -> None:
    """Let the WAL be read from the disk, and not from what the system has cached of it.

    To be called when the disk has failed. After a failed fsync Linux takes the pages for written
    (https://lwn.net/Articles/752063/), and ext4 may not even write them where they are overwritten
    and synced again: so what is to be written next must find nothing of them.
    """
    _, _, path = connection.execute("PRAGMA database_list").fetchone()
    _advise(_wal(Path(path)), "DONTNEED")


def _advise(file: Path, advice: str) -> None:
    """Tell the system what is to be cached of a file (posix_fadvise(2))."""
    # Closing a file lets go of this process's locks on it; on a WAL, SQLite holds none.
    with contextlib.suppress(OSError, AttributeError):  # no such file; no such call on macOS
        descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.posix_fadvise(descriptor, 0, 0, getattr(os, f"POSIX_FADV_{advice}"))
        finally:
            os.close(descriptor)


def _wal(path: Path) -> Path:
    return path.with_name(path.name + "-wal")


def _check(path: Path) -> None:
    """Refuse a damaged or a foreign file, and leave everything as it is, also beside it."""
    journal, wal = path.with_name(path.name + "-journal"), _wal(path)
    # A process that died while it made the file left a journal, which is rolled back by writing.
    # What it had not yet moved out of the WAL is read from there. Else nothing beside it counts.
    mode = "rw" if _has_content(journal) else "ro" if _has_content(wal) else "ro&immutable=1"
    uri = f"{path.absolute().as_uri()}?mode={mode}"
    with contextlib.closing(sqlite3.connect(uri, uri=True)) as db:
        (verdict,) = db.execute("PRAGMA quick_check(1)").fetchone()
        if verdict != "ok":
            raise sqlite3.DatabaseError(f"it is damaged ({verdict.splitlines()[-1]})")
        (page_size,) = db.execute("PRAGMA page_size").fetchone()
        # SQLite reads zeros where the last page is cut off, and finds nothing wrong with them.
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


def _has_content(path: Path) -> bool:
    return path.exists() and path.stat().st_size > 0


def _prepare(connection: sqlite3.Connection) -> None:
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")  # fsync before COMMIT returns
    # With FULL, the checkpoint is a second fsync; a larger WAL makes it rarer.
    connection.execute("PRAGMA wal_autocheckpoint = 4000")
    connection.execute("PRAGMA cache_size = -16000")
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version == 0:
        script = files("afterward.engines.sqlite").joinpath("schema.sql").read_text()
        connection.executescript(
            f"BEGIN IMMEDIATE; {script}; PRAGMA application_id = {APPLICATION_ID}; "
            f"PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;"
        )
    # The lock says that no other process lives, so whoever held a lease is dead.
    connection.execute("UPDATE tasks SET lease_expires_at = 0 WHERE status = 'running'")
