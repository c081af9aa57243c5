"""SAQ on Redis, with as many concurrent operations as clients."""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated

from fastapi import Body, Depends, FastAPI
from pydantic import EmailStr
from saq import Queue  # type: ignore[import-not-found]

from benchmarks.bare import Notification, log_query
from benchmarks.load import CONNECTIONS

queue = Queue.from_url(os.environ["REDIS_URL"], max_concurrent_ops=CONNECTIONS)


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    """Keep the queue connected while the app runs."""
    await queue.connect()
    yield
    await queue.disconnect()


app = FastAPI(lifespan=lifespan)


@app.post("/send-notification/{email}", status_code=202, dependencies=[Depends(log_query)])
async def send_notification(
    email: EmailStr, notification: Annotated[Notification | None, Body()] = None
) -> dict[str, str]:
    """Queue a job for the mail before the answer."""
    mail = notification or Notification()
    job = await queue.enqueue(
        "send_email", recipient=email, subject=mail.subject, message=mail.message
    )
    return {"id": job.id}
