"""The tutorial's route, with the service's inputs and validation, and with tasks that do nothing.

As in FastAPI's own tutorial, the dependency adds a task, and the route adds another.
"""

from typing import Annotated

from fastapi import BackgroundTasks, Body, Depends, FastAPI, Query
from pydantic import BaseModel, ConfigDict, EmailStr, Field

app = FastAPI()


class Notification(BaseModel):
    """The service's fields with the same limits."""

    model_config = ConfigDict(extra="forbid")

    subject: str = Field("Notification", max_length=200)
    message: str = "This is a notification."


async def do_nothing(*_: str) -> None:
    """Return at once."""


async def log_query(
    background_tasks: BackgroundTasks, q: Annotated[str | None, Query(max_length=1000)] = None
) -> None:
    """Add a task for the query parameter, like the tutorial's dependency."""
    if q:
        background_tasks.add_task(do_nothing, q)


@app.post("/send-notification/{email}", status_code=202, dependencies=[Depends(log_query)])
async def send_notification(
    email: EmailStr,
    background_tasks: BackgroundTasks,
    notification: Annotated[Notification | None, Body()] = None,
) -> dict[str, str]:
    """Add a task for the mail, like the tutorial's route."""
    mail = notification or Notification()
    background_tasks.add_task(do_nothing, email, mail.subject, mail.message)
    return {"message": "Notification sent in the background"}
