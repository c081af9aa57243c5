"""The tutorial's route as it stands everywhere, with the same validation and an idle task."""

from typing import Annotated

from fastapi import BackgroundTasks, Body, FastAPI
from pydantic import BaseModel, ConfigDict, EmailStr, Field

app = FastAPI()


class Notification(BaseModel):
    """The same fields, with the same bounds."""

    model_config = ConfigDict(extra="forbid")

    subject: str = Field("Notification", max_length=200)
    message: str = "This is a notification."


async def do_nothing(email: str, subject: str, message: str) -> None:
    """The task."""


@app.post("/send-notification/{email}", status_code=202)
async def send_notification(
    email: EmailStr,
    background_tasks: BackgroundTasks,
    notification: Annotated[Notification | None, Body()] = None,
) -> dict[str, str]:
    """The tutorial's route."""
    mail = notification or Notification()
    background_tasks.add_task(do_nothing, email, mail.subject, mail.message)
    return {"message": "Notification sent in the background"}
