"""The durable task that saves a client's data."""

from typing import Any

import structlog

from afterward.task import Record, Writes
from app.tasks.tools import Context

COLLECTION = "data"

log = structlog.get_logger(__name__)


async def save_data(context: Context, *, user_id: str, data: dict[str, Any]) -> None:
    """Save the data under the user's id. They replace the data of an earlier call."""
    task = context.task
    record = Record(COLLECTION, task.client, user_id, data, task.created_at)
    await context.tools.engine.put(Writes(records=(record,)))
    log.info("data saved", fields=len(data))
