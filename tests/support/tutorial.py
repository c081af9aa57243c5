"""The service as tutorials write it, with plain BackgroundTasks, for negative controls."""

import os
import uuid
from email.message import EmailMessage

import aiosmtplib
import uvicorn
from fastapi import BackgroundTasks, FastAPI
from pydantic import EmailStr

app = FastAPI()


@app.get("/livez")
async def livez() -> None:
    """Answer 200."""


@app.post("/send-notification/{email}", status_code=202)
async def send_notification(email: EmailStr, background_tasks: BackgroundTasks) -> dict[str, str]:
    """Answer 202, and send the mail afterwards. A crash in between loses it."""
    mail_id = str(uuid.uuid4())
    background_tasks.add_task(send_email, mail_id, email)
    return {"id": mail_id, "message": "Notification sent in the background"}


async def send_email(mail_id: str, email: str) -> None:
    """Send a mail."""
    message = EmailMessage()
    message["Message-ID"] = f"<{mail_id}@example.com>"
    message["From"] = "notifications@example.com"
    message["To"] = email
    message["Subject"] = "Notification"
    message.set_content("This is a notification.")
    await aiosmtplib.send(message, hostname="127.0.0.1", port=int(os.environ["SMTP_PORT"]))


if __name__ == "__main__":
    uvicorn.run(app, port=int(os.environ["PORT"]), access_log=False)
