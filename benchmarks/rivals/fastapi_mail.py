"""fastapi-mail in BackgroundTasks, as its documentation shows."""

import os
from typing import Annotated

from fastapi import BackgroundTasks, Body, Depends, FastAPI
from fastapi_mail import (  # type: ignore[import-not-found]
    ConnectionConfig,
    FastMail,
    MessageSchema,
    MessageType,
    NameEmail,
)
from pydantic import EmailStr, SecretStr

from benchmarks.bare import Notification, log_query

# The given LOCAL_HOSTNAME saves a look-up for each mail.
mailer = FastMail(
    ConnectionConfig(
        MAIL_USERNAME="",
        MAIL_PASSWORD=SecretStr(""),
        MAIL_FROM="notifications@example.com",
        MAIL_SERVER="127.0.0.1",
        MAIL_PORT=int(os.environ["SMTP_PORT"]),
        MAIL_STARTTLS=False,
        MAIL_SSL_TLS=False,
        USE_CREDENTIALS=False,
        LOCAL_HOSTNAME="localhost",
    )
)

app = FastAPI()


@app.post("/send-notification/{email}", status_code=202, dependencies=[Depends(log_query)])
async def send_notification(
    email: EmailStr,
    background_tasks: BackgroundTasks,
    notification: Annotated[Notification | None, Body()] = None,
) -> dict[str, str]:
    """Add a task for the mail, like the tutorial's route."""
    mail = notification or Notification()
    message = MessageSchema(
        recipients=[NameEmail(name=email, email=email)],
        subject=mail.subject,
        body=mail.message,
        subtype=MessageType.plain,
    )
    background_tasks.add_task(mailer.send_message, message)
    return {"message": "Notification sent in the background"}
