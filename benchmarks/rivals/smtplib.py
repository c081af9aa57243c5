"""smtplib in BackgroundTasks: a `def` task in FastAPI's threads, as the oldest tutorials do."""

import os
import smtplib
from email.message import EmailMessage
from typing import Annotated

from fastapi import BackgroundTasks, Body, Depends, FastAPI
from pydantic import EmailStr

from benchmarks.bare import Notification, log_query

PORT = int(os.environ["SMTP_PORT"])

app = FastAPI()


def send_email(recipient: str, subject: str, message: str) -> None:
    """Send a mail. The given `local_hostname` saves a look-up for each mail."""
    mail = EmailMessage()
    mail["From"] = "notifications@example.com"
    mail["To"] = recipient
    mail["Subject"] = subject
    mail.set_content(message)
    with smtplib.SMTP("127.0.0.1", PORT, local_hostname="localhost") as client:
        client.send_message(mail)


@app.post("/send-notification/{email}", status_code=202, dependencies=[Depends(log_query)])
async def send_notification(
    email: EmailStr,
    background_tasks: BackgroundTasks,
    notification: Annotated[Notification | None, Body()] = None,
) -> dict[str, str]:
    """Add a task for the mail, like the tutorial's route."""
    mail = notification or Notification()
    background_tasks.add_task(send_email, email, mail.subject, mail.message)
    return {"message": "Notification sent in the background"}
