"""Procrastinate on PostgreSQL, with a pool of connections."""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated

from fastapi import Body, Depends, FastAPI
from procrastinate import App, PsycopgConnector  # type: ignore[import-not-found]
from pydantic import EmailStr

from benchmarks.bare import Notification, log_query

POOL = 10

tasks = App(
    connector=PsycopgConnector(conninfo=os.environ["DATABASE_URL"], min_size=POOL, max_size=POOL)
)


async def send_email(*, recipient: str, subject: str, message: str) -> None:
    """Do nothing. No worker runs this task here."""


task = tasks.task(send_email, name="send_email")


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    """Create the tables, and keep the pool open while the app runs."""
    async with tasks.open_async():
        await tasks.schema_manager.apply_schema_async()
        yield


app = FastAPI(lifespan=lifespan)


@app.post("/send-notification/{email}", status_code=202, dependencies=[Depends(log_query)])
async def send_notification(
    email: EmailStr, notification: Annotated[Notification | None, Body()] = None
) -> dict[str, int]:
    """Queue a job for the mail before the answer."""
    mail = notification or Notification()
    job = await task.defer_async(recipient=email, subject=mail.subject, message=mail.message)
    return {"id": job}
