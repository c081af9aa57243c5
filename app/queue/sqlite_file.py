"""Opens the embedded engine's file: locked for one process, checked, and prepared."""

import contextlib
import fcntl
import os
import sqlite3
from importlib.resources import files
from pathlib import Path

from app.queue.errors import CannotStart

SCHEMA_VERSION = 2
LOCKED_SECONDS = 1.0  # how long a statement waits for somebody else's lock on the file


def lock(path: Path) -> int:
    """Take the lock file beside the database for this process, or raise CannotStart.

    One process it is: SQLite before 3.51.3 can corrupt a WAL that two connections write and
    checkpoint at once, and the queue's wake-ups and group commit live in one process.
    """
    # Of the file itself: a link is only another name for it.
    lock_path = Path(os.path.realpath(path) + ".lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = os.open(lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise CannotStart(f"{lock_path} cannot be opened: {error.strerror}.") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(lock)
        raise CannotStart(
            f"{path} is in use by another process. SQLite serves one process; for several, "
            "set QUEUE_URL=postgresql://…"
        ) from error
    os.ftruncate(lock, 0)
    os.write(lock, f"{os.getpid()}\n".encode())  # for people; only the lock itself counts
    return lock


def open_database(path: Path) -> sqlite3.Connection:
    """Open the database, in autocommit mode, for use by one thread; it is made if it is missing.

    Raises CannotStart for a file that is damaged, foreign or newer, and leaves it as it is.
    """
    connection = None
    try:
        if path.exists():
            _check(path)
        connection = sqlite3.connect(
            path, timeout=LOCKED_SECONDS, isolation_level=None, check_same_thread=False
        )
        _prepare(connection)
    except sqlite3.Error as error:
        if connection is not None:
            connection.close()
        raise CannotStart(
            f"{path} cannot be the queue's database: {error}. It was left as it is."
        ) from error
    return connection


def _check(path: Path) -> None:
    """Refuse a damaged or a foreign file, read-only: then even its WAL stays as it is."""
    # A process that died while it made the file left a journal, which is rolled back by writing.
    mode = "rw" if path.with_name(path.name + "-journal").exists() else "ro"
    uri = f"{path.absolute().as_uri()}?mode={mode}"
    with contextlib.closing(sqlite3.connect(uri, uri=True)) as db:
        (verdict,) = db.execute("PRAGMA quick_check(1)").fetchone()
        if verdict != "ok":
            raise sqlite3.DatabaseError(f"it is damaged ({verdict.splitlines()[-1]})")
        (version,) = db.execute("PRAGMA user_version").fetchone()
        if version == 0 and db.execute("SELECT 1 FROM sqlite_schema").fetchone():
            raise sqlite3.DatabaseError("it belongs to another program")
        if version > SCHEMA_VERSION:
            raise sqlite3.DatabaseError(f"it was written by a newer version (schema {version})")


def _prepare(connection: sqlite3.Connection) -> None:
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")  # fsync before COMMIT returns
    # With FULL, the checkpoint is a second fsync; a larger WAL makes it rarer.
    connection.execute("PRAGMA wal_autocheckpoint = 4000")
    connection.execute("PRAGMA cache_size = -16000")
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version < SCHEMA_VERSION:
        script = f"schema_from_{version}.sql" if version else "schema.sql"
        schema = files("app.queue").joinpath(script).read_text()
        connection.executescript(
            f"BEGIN IMMEDIATE; {schema}; PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;"
        )
    # The lock says that no other process lives, so whoever held a lease is dead.
    connection.execute("UPDATE tasks SET lease_expires_at = 0 WHERE status = 'running'")
