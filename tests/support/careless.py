"""The service without some of its care for the disk, for negative controls.

`python -m tests.support.careless` serves like `python -m app`. WITHOUT names what it does not do.
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
            # A log that does not grow: else its own fsync takes the names along, on ext4.
            _prepare_and(lambda connection: connection.execute("PRAGMA wal_autocheckpoint = 20"))
        case "doubt":  # in what the system has cached when an fsync has failed
            sqlite_file._advise = lambda *_: None
        case _:
            raise ValueError(without)


def _prepare_and(then: Callable[[sqlite3.Connection], object]) -> None:
    prepare = sqlite_file._prepare

    def prepare_carelessly(connection: sqlite3.Connection) -> None:
        prepare(connection)
        then(connection)

    sqlite_file._prepare = prepare_carelessly


def _skip_fsync(is_one: Callable[[int], bool]) -> None:
    fsync = os.fsync

    def fsync_others(descriptor: int) -> None:
        if not is_one(os.fstat(descriptor).st_mode):
            fsync(descriptor)

    os.fsync = fsync_others  # type: ignore[assignment]


if __name__ == "__main__":
    _weaken(os.environ["WITHOUT"])
    main()
