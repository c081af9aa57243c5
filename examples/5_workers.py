"""Run workers as processes of their own, on any number of machines.

They share one PostgreSQL with the API:

    docker run --rm -p 5432:5432 -e POSTGRES_PASSWORD=secret postgres:18
    export DATABASE_URL=postgresql://postgres:secret@localhost/postgres
    .venv/bin/uvicorn examples.5_workers:app     # the API: it runs no tasks
    .venv/bin/python -m examples.5_workers       # a worker: start two, in other terminals
    for n in $(seq 40); do curl -X POST localhost:8000/send-notification/user$n@example.com; done

Each worker runs four tasks at a time, and prints the mails that it sends. Kill one of them while it
sends: `kill -9`, with the process id that it prints at its start. The lease on its tasks expires
after five seconds, and then the other worker runs them. Ctrl-C lets a worker finish its tasks
first. While no worker runs, the API still accepts mails, and they wait.
"""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import APIRouter, FastAPI

from afterward import Afterward, Context
from afterward.engines import make_tables
from afterward.fastapi import DurableRoute, DurableTasks

URL = os.environ["DATABASE_URL"]


async def send_email(_: Context[None], recipient: str) -> None:
    """Stand in for SMTP. After a crash it runs again, even if the mail was sent just before."""
    await asyncio.sleep(2)
    print(f"sent to {recipient} by worker {os.getpid()}", flush=True)


def afterward_with(*, concurrency: int) -> Afterward[None]:
    """Return the queue's object for one process. The API needs the tasks to check arguments."""
    return Afterward(URL, tasks=[send_email], concurrency=concurrency, lease_seconds=5)


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[dict[str, object]]:
    """Create the tables, and connect. No task runs in this process."""
    await make_tables(URL)
    async with afterward_with(concurrency=0).lifespan(app) as state:
        yield state


app = FastAPI(lifespan=lifespan)
router = APIRouter(route_class=DurableRoute)


@router.post("/send-notification/{recipient}", status_code=202)
async def send_notification(recipient: str, durable_tasks: DurableTasks) -> dict[str, str]:
    """Promise a mail. PostgreSQL wakes the workers when it commits the row."""
    return {"id": durable_tasks.add_task(send_email, recipient).id}


app.include_router(router)


async def main() -> None:
    """Run tasks until Ctrl-C or SIGTERM."""
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await make_tables(URL)
    async with afterward_with(concurrency=4).running():
        print(f"worker {os.getpid()} is waiting for tasks", flush=True)
        await stop.wait()


if __name__ == "__main__":
    asyncio.run(main())
