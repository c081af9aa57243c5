"""Taskiq on a Redis stream, its broker with acknowledgements. The task waits in Redis."""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated

from fastapi import Body, Depends, FastAPI
from pydantic import EmailStr
from taskiq_redis import RedisStreamBroker  # type: ignore[import-not-found]

from benchmarks.bare import Notification, log_query
from benchmarks.load import CONNECTIONS

broker = RedisStreamBroker(os.environ["REDIS_URL"], max_connection_pool_size=CONNECTIONS)


async def send_email(recipient: str, subject: str, message: str) -> None:
    """Do nothing. No worker runs this task here."""


task = broker.register_task(send_email, "send_email")


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    """Keep the broker connected while the app runs."""
    await broker.startup()
    yield
    await broker.shutdown()


app = FastAPI(lifespan=lifespan)


@app.post("/send-notification/{email}", status_code=202, dependencies=[Depends(log_query)])
async def send_notification(
    email: EmailStr, notification: Annotated[Notification | None, Body()] = None
) -> dict[str, str]:
    """Queue a task for the mail before the answer."""
    mail = notification or Notification()
    kept = await task.kiq(recipient=email, subject=mail.subject, message=mail.message)
    return {"id": kept.task_id}
