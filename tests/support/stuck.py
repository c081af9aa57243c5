"""A worker that says nothing more in the middle of a claim: one task's locks are its own."""

import asyncio
import os
import time

from app.queue.postgres import Postgres
from app.queue.postgres_entries import TASK
from app.queue.postgres_rows import begin_attempts


async def main() -> None:
    """Claim one task of QUEUE_URL, and never commit it."""
    engine = Postgres(os.environ["QUEUE_URL"])
    await engine.start()
    async with engine._transaction() as session:
        await begin_attempts(session, TASK, "stuck", limit=1, silence=30, now=time.time())
        print("locked", flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main())
