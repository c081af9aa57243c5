"""The tutorial's route as it stands everywhere: same inputs, same validation, idle tasks.

As in FastAPI's own tutorial, one task is added in a dependency and one in the route; the tasks here
do nothing.
"""

from typing import Annotated

from fastapi import BackgroundTasks, Body, Depends, FastAPI, Query
from pydantic import BaseModel, ConfigDict, EmailStr, Field

app = FastAPI()


class Notification(BaseModel):
    """The same fields, with the same bounds."""

    model_config = ConfigDict(extra="forbid")

    subject: str = Field("Notification", max_length=200)
    message: str = "This is a notification."


async def do_nothing(*_: str) -> None:
    """The task."""


async def log_query(
    background_tasks: BackgroundTasks, q: Annotated[str | None, Query(max_length=1000)] = None
) -> None:
    """The tutorial's dependency."""
    if q:
        background_tasks.add_task(do_nothing, q)


@app.post("/send-notification/{email}", status_code=202, dependencies=[Depends(log_query)])
async def send_notification(
    email: EmailStr,
    background_tasks: BackgroundTasks,
    notification: Annotated[Notification | None, Body()] = None,
) -> dict[str, str]:
    """The tutorial's route."""
    mail = notification or Notification()
    background_tasks.add_task(do_nothing, email, mail.subject, mail.message)
    return {"message": "Notification sent in the background"}
