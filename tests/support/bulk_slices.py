"""The service with bulk actions in slices of SLICE tasks, so that a kill finds one under way.

`python -m tests.support.bulk_slices` serves like `python -m app`. With WITHOUT=transaction, for a
negative control, the record of an action is written some time after the tasks of the slice.
"""

import asyncio
import os
from typing import Any

from afterward import queue
from afterward.bulk import COLLECTION, Slice
from afterward.engines.sqlite.engine import SQLite
from afterward.errors import RecordNotFound
from afterward.task import Record, Task, Writes
from app.__main__ import main

GAP_SECONDS = 0.05  # between the two transactions


def _write_records_later() -> None:
    change_slice = SQLite.change_slice

    async def change_tasks_first(
        engine: SQLite, task: Task, *args: Any, **kwargs: Any
    ) -> Slice | None:
        before = await _records(engine, task)
        piece = await change_slice(engine, task, *args, **kwargs)
        after = await _records(engine, task)
        # Take the record back, as if only the tasks had been written.
        await engine.put(Writes(records=before, removed=() if before else after))
        await asyncio.sleep(GAP_SECONDS)
        await engine.put(Writes(records=after))
        return piece

    SQLite.change_slice = change_tasks_first  # type: ignore[assignment, method-assign]


async def _records(engine: SQLite, task: Task) -> tuple[Record, ...]:
    """Return the record of the action; nothing before its first slice."""
    try:
        return (await engine.read_record(COLLECTION, task.id, client=task.client),)
    except RecordNotFound:
        return ()


if __name__ == "__main__":
    queue.SLICE = int(os.environ["SLICE"])  # type: ignore[attr-defined]
    if os.environ.get("WITHOUT") == "transaction":
        _write_records_later()
    main()
