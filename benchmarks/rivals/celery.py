"""Celery on Redis. Its client is synchronous, so the route is a `def` in FastAPI's threads."""

import os
from typing import Annotated

from celery import Celery  # type: ignore[import-not-found]
from fastapi import Body, Depends, FastAPI
from pydantic import EmailStr

from benchmarks.bare import Notification, log_query

THREADS = 40  # the number of FastAPI's threads

tasks = Celery(broker=os.environ["REDIS_URL"])
tasks.conf.update(task_ignore_result=True, broker_pool_limit=THREADS)


def send_email(recipient: str, subject: str, message: str) -> None:
    """Do nothing. No worker runs this task here."""


task = tasks.task(send_email, name="send_email")

app = FastAPI()


@app.post("/send-notification/{email}", status_code=202, dependencies=[Depends(log_query)])
def send_notification(
    email: EmailStr, notification: Annotated[Notification | None, Body()] = None
) -> dict[str, str]:
    """Queue a task for the mail before the answer."""
    mail = notification or Notification()
    kept = task.delay(recipient=email, subject=mail.subject, message=mail.message)
    return {"id": kept.id}
