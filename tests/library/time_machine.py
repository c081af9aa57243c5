"""Makes PostgreSQL believe what a test says the time is, so that leases run out without waiting.

The statements ask for the time by the database's clock, with now(). In a database with the time
machine another function of that name is found first. Everything else is as it is in production.
"""

import asyncio
import inspect
from typing import Any

import asyncpg

from afterward.engine import Engine
from afterward.engines import open_engine
from afterward.task import Writes

# The clock must not be turned while one of these runs.
GATED = {"claim", "extend", "pull_forward"}

INSTALL = """
CREATE SCHEMA clock;
CREATE TABLE clock.hands AS SELECT pg_catalog.now() AS instant;
CREATE FUNCTION clock.now() RETURNS timestamptz LANGUAGE sql STABLE
    AS 'SELECT instant FROM clock.hands';
"""


ENTRANCE = "?search_path=clock,pg_catalog"  # to a database's address


def opened(url: str) -> Engine:
    """The engine of this URL; in the time machine, if its database has a clock of its own."""
    engine: Any = open_engine(url)
    return engine if url.startswith("sqlite:") else TimeMachine(engine, url)


class TimeMachine:
    """Passes on what is asked of an engine, and turns its database's clock beforehand."""

    def __init__(self, engine: Engine, url: str) -> None:
        self._engine = engine
        self._url = url
        self._turning = asyncio.Lock()
        self._clock: asyncpg.Connection[Any]

    async def start(self) -> None:
        """Start the engine."""
        self._clock = await asyncpg.connect(self._url)
        await self._engine.start()

    async def stop(self) -> None:
        """Stop the engine."""
        await self._engine.stop()
        await self._clock.close()

    def __getattr__(self, verb: str) -> Any:
        """Whatever else an engine can do."""
        do = getattr(self._engine, verb)
        signature = inspect.signature(do)
        if "now" not in signature.parameters and verb != "put":
            return do

        async def do_then(*args: Any, **kwargs: Any) -> Any:
            given = signature.bind(*args, **kwargs).arguments
            now = _put_at(given["writes"]) if verb == "put" else given["now"]
            async with self._turning:
                if now is not None:
                    await self._turn(now)
                if verb in GATED:
                    return await do(*args, **kwargs)
            return await do(*args, **kwargs)

        return do_then

    async def _turn(self, now: float) -> None:
        await self._clock.execute("UPDATE clock.hands SET instant = to_timestamp($1::float8)", now)


def _put_at(writes: Writes) -> float | None:
    return writes.tasks[0].updated_at if writes.tasks else None
