"""Sets PostgreSQL's clock to the time of the test, so that leases expire without a wait.

The engine's statements read the database's clock with now(). The schema `clock` has a function of
the same name, and the search path leads to it first. Everything else is as in production.
"""

import asyncio
import inspect
from typing import Any

import asyncpg

from afterward.engine import Engine
from afterward.engines import open_engine
from afterward.task import Writes

# No other call may set the clock while one of these runs.
GATED = {"claim", "extend", "pull_forward"}

INSTALL = """
CREATE SCHEMA clock;
CREATE TABLE clock.hands AS SELECT pg_catalog.now() AS instant;
CREATE FUNCTION clock.now() RETURNS timestamptz LANGUAGE sql STABLE
    AS 'SELECT instant FROM clock.hands';
"""


ENTRANCE = "?search_path=clock,pg_catalog"  # added to the URL of a database with `clock`


def opened(url: str) -> Engine:
    """Make the engine of this URL, inside the time machine if its database is PostgreSQL."""
    engine: Any = open_engine(url)
    return engine if url.startswith("sqlite:") else TimeMachine(engine, url)


class TimeMachine:
    """Wraps an engine: sets the database's clock to the call's `now`, then passes the call on."""

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
        """Return the engine's method, with the clock set first if the method takes a time."""
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
