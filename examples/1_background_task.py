"""FastAPI's own BackgroundTasks, and what a kill takes.

Run it, and ask for a mail:

    .venv/bin/uvicorn examples.1_background_task:app
    curl -X POST localhost:8000/send-notification/ada@example.com

The client gets its 202 at once. Two seconds later the server prints "sent to ada@example.com".

Ask for another mail, and end the server within these two seconds, as a crash would:

    pkill -9 -f 1_background_task

Start it again, and wait: the mail is never sent. Nothing on disk tells that it was promised, and
nobody gets an error. The same happens at each deployment that does not wait for the task, and when
the system runs out of memory. The next example keeps its promises.
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
    """Promise a mail."""
    # The task is an object in the memory of this process. FastAPI runs it after the response.
    background_tasks.add_task(send_email, recipient)
    return {"message": "The mail will be sent."}
