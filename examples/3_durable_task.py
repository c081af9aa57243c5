"""The same with the library: a durable task is added as simply as one of FastAPI's own.

    .venv/bin/uvicorn examples.3_durable_task:app
    curl -X POST localhost:8000/send-notification/ada@example.com
    curl localhost:8000/tasks/ID    # with the id from the answer

Try the crash and the failure of 2_smallest.py here too: run `pkill -9 -f 'uvicorn examples.3'`
within two seconds of a request, or `touch smtp-is-down` before a request and `rm smtp-is-down`
after it. The library adds:

- Many requests share one commit, and the event loop does not wait for the disk.
- While SMTP is down, a mail is tried for four days. A task that fails because of a bug is tried
  eight times. A task that crashes its process is tried three times.
- A client can repeat a request with the same key: only the first one adds a task.
      curl -X POST -H 'Idempotency-Key: 1' localhost:8000/send-notification/ada@example.com
- Finished tasks are removed after a week. After Ctrl-C, running tasks have ten seconds to finish.
"""

import asyncio
import logging
from pathlib import Path

from fastapi import APIRouter, FastAPI, HTTPException

from afterward import Afterward, Context, RetryPolicy, Task, TaskKind, TaskNotFound, TemporaryError
from afterward.fastapi import DurableRoute, DurableTasks

logging.basicConfig(level=logging.INFO)  # a line for each change of a task

FOUR_DAYS = 4 * 24 * 3600.0


async def send_email(_: Context[None], recipient: str) -> None:
    """Stand in for SMTP. After a crash it runs again, even if the mail was sent just before."""
    if Path("smtp-is-down").exists():
        raise TemporaryError("the SMTP server does not answer")
    await asyncio.sleep(2)
    print(f"sent to {recipient}")


afterward = Afterward(
    "sqlite:///queue.db", tasks=[TaskKind(send_email, RetryPolicy(give_up_after=FOUR_DAYS))]
)
app = FastAPI(lifespan=afterward.lifespan)
router = APIRouter(route_class=DurableRoute)  # commits the tasks of a route before its response


@router.post("/send-notification/{recipient}", status_code=202)
async def send_notification(recipient: str, durable_tasks: DurableTasks) -> dict[str, str]:
    """Promise a mail: its row is on disk before the 202."""
    task = durable_tasks.add_task(send_email, recipient)
    return {"id": task.id}


@router.get("/tasks/{task_id}")
async def read_task(task_id: str) -> Task:
    """Show how far a task is."""
    try:
        return await afterward.queue.get(task_id)
    except TaskNotFound as error:
        raise HTTPException(404, str(error)) from error


app.include_router(router)
