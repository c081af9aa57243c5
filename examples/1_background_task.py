"""FastAPI's own BackgroundTasks: a kill loses the tasks that are not done.

Run it, and ask for a mail:

    .venv/bin/uvicorn examples.1_background_task:app
    curl -X POST localhost:8000/send-notification/ada@example.com

The client gets its 202 at once. Two seconds later the server prints "sent to ada@example.com".

Ask for another mail, and kill the server within these two seconds, as a crash would end it:

    pkill -9 -f 'uvicorn examples.1'

Start it again, and wait: the mail is never sent. The task was in the memory of the process, and
the client already has its 202. The same happens when the system runs out of memory, or when a
deployment does not wait for the task. The next example keeps the task in a database.
"""

import asyncio

from fastapi import BackgroundTasks, FastAPI

app = FastAPI()


async def send_email(recipient: str) -> None:
    """Stand in for an SMTP server that takes two seconds for a mail."""
    await asyncio.sleep(2)
    print(f"sent to {recipient}")


@app.post("/send-notification/{recipient}", status_code=202)
async def send_notification(recipient: str, background_tasks: BackgroundTasks) -> dict[str, str]:
    """Answer 202, and send the mail after the response."""
    # This writes nothing to disk. FastAPI runs the task after the response.
    background_tasks.add_task(send_email, recipient)
    return {"message": "The mail will be sent."}
