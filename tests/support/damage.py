"""A database with finished tasks and a damaged page, which the start does not find."""

import asyncio
import sqlite3
import time
from contextlib import closing
from pathlib import Path

import pytest

from afterward.engines.sqlite import damage_check
from tests.library.support import a_task, opened, put

PAGE = 4096
TABLE_LEAF = 0x0D  # the first byte of a page with rows (https://sqlite.org/fileformat2.html)


class DamagedRecord:
    """The file at `path`: `tasks` finished tasks, and a damaged page in the middle of their rows.

    The row of `task_on_page` is on that page, the row of `newest_task` is on another page.
    """

    def __init__(self, path: Path, tasks: int) -> None:
        now = time.time()
        made = [a_task(at=now) for _ in range(tasks)]

        async def make() -> None:
            async with opened(path) as engine:
                await put(engine, *made)

        asyncio.run(make())
        with closing(sqlite3.connect(path)) as connection, connection:
            connection.execute("UPDATE tasks SET status = 'succeeded', finished_at = ?", (now,))
        self.path = path
        self.newest_task = max(task.id for task in made)
        self._sound = path.read_bytes()
        pages = [self._sound[at : at + PAGE] for at in range(0, len(self._sound), PAGE)]
        rows = [number for number, page in enumerate(pages) if page[0] == TABLE_LEAF]
        damaged = rows[len(rows) // 2]
        self.task_on_page = next(task.id for task in made if task.id.encode() in pages[damaged])
        pages[damaged] = b"\xff" * PAGE
        self._damaged = b"".join(pages)
        path.write_bytes(self._damaged)

    def is_unchanged(self) -> bool:
        """Whether the file is as this object has written it."""
        return self.path.read_bytes() == self._damaged

    def mend(self) -> None:
        """Write the sound page again."""
        self.path.write_bytes(self._sound)


def leave_the_check_to_the_background(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the start no time for the check, so that a small file behaves like a large one."""
    monkeypatch.setattr(damage_check, "START_SECONDS", -1.0)
    monkeypatch.setattr(damage_check, "FIRST_SECONDS", 0.05)
