"""The tutorials' way: a background task opens a connection for its mail, and waits for nobody."""

import os
from email.message import EmailMessage
from typing import Annotated

import aiosmtplib
from fastapi import BackgroundTasks, Body, Depends, FastAPI
from pydantic import EmailStr

from benchmarks.bare import Notification, log_query

PORT = int(os.environ["SMTP_PORT"])

app = FastAPI()


async def send_email(to: str, subject: str, message: str) -> None:
    """Send one mail. The client's name is given, so that no mail has to look it up."""
    mail = EmailMessage()
    mail["From"] = "notifications@example.com"
    mail["To"] = to
    mail["Subject"] = subject
    mail.set_content(message)
    await aiosmtplib.send(mail, hostname="127.0.0.1", port=PORT, local_hostname="localhost")


@app.post("/send-notification/{email}", status_code=202, dependencies=[Depends(log_query)])
async def send_notification(
    email: EmailStr,
    background_tasks: BackgroundTasks,
    notification: Annotated[Notification | None, Body()] = None,
) -> dict[str, str]:
    """The tutorial's route."""
    mail = notification or Notification()
    background_tasks.add_task(send_email, email, mail.subject, mail.message)
    return {"message": "Notification sent in the background"}
