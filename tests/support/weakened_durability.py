"""The service without one of its protections against data loss, for negative controls.

`python -m tests.support.weakened_durability` serves like `python -m app`. The environment variable
WITHOUT names the protection to leave out.
"""

import os
import sqlite3
import stat
from collections.abc import Callable

from afterward.engines.sqlite import database_file as sqlite_file
from app.__main__ import main


def _weaken(without: str) -> None:
    match without:
        case "fsync of commits":
            _prepare_and(lambda connection: connection.execute("PRAGMA synchronous = NORMAL"))
        case "fsync of files":
            _skip_fsync(stat.S_ISREG)
        case "fsync of folders":
            _skip_fsync(stat.S_ISDIR)
            # Keep the WAL small. Otherwise ext4 writes the new names together with the fsync of a
            # growing WAL, and the control would lose nothing.
            _prepare_and(lambda connection: connection.execute("PRAGMA wal_autocheckpoint = 20"))
        case "doubt":  # keep the page cache after a failed fsync, although it is not on disk
            sqlite_file._drop_from_cache = lambda *_: None
        case _:
            raise ValueError(without)


def _prepare_and(then: Callable[[sqlite3.Connection], object]) -> None:
    """Call `then` with each new connection after SQLite's usual preparation."""
    prepare = sqlite_file._prepare

    def prepare_carelessly(connection: sqlite3.Connection) -> None:
        prepare(connection)
        then(connection)

    sqlite_file._prepare = prepare_carelessly


def _skip_fsync(has_type: Callable[[int], bool]) -> None:
    fsync = os.fsync

    def fsync_others(descriptor: int) -> None:
        if not has_type(os.fstat(descriptor).st_mode):
            fsync(descriptor)

    os.fsync = fsync_others  # type: ignore[assignment]


if __name__ == "__main__":
    _weaken(os.environ["WITHOUT"])
    main()
