"""A worker that stops in the middle of a claim, and keeps the lock of one task's row."""

import asyncio
import os

from afterward.engines.postgres.engine import Postgres


async def main() -> None:
    """Claim one task of QUEUE_URL in a transaction that never commits."""
    engine = Postgres(os.environ["QUEUE_URL"])
    await engine.start()
    async with engine._pool.transaction() as session:
        await session.execute(
            """
            UPDATE afterward.tasks
            SET status = 'running', owner = 'stuck', attempts = attempts + 1, claims = claims + 1,
                lease_until = now() + interval '30 s'
            WHERE seq = (SELECT min(seq) FROM afterward.tasks WHERE status = 'queued')
            """
        )
        print("locked", flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main())
