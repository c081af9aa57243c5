"""A connection that hears what other sessions notify (LISTEN); if it breaks, another is opened."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import asyncpg
import structlog

from afterward.engines.postgres.schema import Session, Troubles

PING_SECONDS = 5.0  # how soon a connection that died silently is missed
PAUSE_SECONDS = 1.0  # between two tries to connect

Connect = Callable[[], Awaitable["asyncpg.Connection[Any]"]]

# PostgreSQL does not tell who listens. So whoever does holds a lock of that name, for all to see.
_SHOW = "SELECT pg_advisory_lock_shared(hashtext($1))"
_NOTIFY = """
SELECT pg_notify($1, payload) FROM unnest($2::text[]) AS payload
WHERE EXISTS (
    SELECT FROM pg_locks
    WHERE locktype = 'advisory' AND objid = hashtext($1)::oid AND pid IS DISTINCT FROM $3
    AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
)
"""

log = structlog.get_logger(__name__)


class ListeningConnection:
    """Calls back with each payload of the channels that are listened to.

    While there is no connection nothing is heard; `missed` is called once there is one again.
    """

    def __init__(self, connect: Connect, missed: Callable[[], None]) -> None:
        self._connect = connect
        self._missed = missed
        self._channels: dict[str, Callable[[str], None]] = {}
        self._listening: set[str] = set()
        self._asked = asyncio.Event()
        self._server_process: int | None = None
        self._keeping: asyncio.Task[None]

    def start(self, connection: "asyncpg.Connection[Any]") -> None:
        """Listen on this connection; and when it breaks, on others."""
        self._keeping = asyncio.create_task(self._keep(connection), name="listener")

    async def stop(self) -> None:
        """Disconnect."""
        self._keeping.cancel()
        await asyncio.gather(self._keeping, return_exceptions=True)

    def listen(self, channel: str, hear: Callable[[str], None]) -> None:
        """Call `hear` with each payload, in a moment and from then on."""
        self._channels[channel] = hear
        self._asked.set()

    async def notify(self, session: Session, channel: str, payloads: Sequence[str]) -> bool:
        """Send payloads to a channel if any but this listens to it; says whether one does."""
        return bool(await session.fetch(_NOTIFY, channel, payloads, self._server_process))

    def _heard(self, _: object, __: object, channel: str, payload: object) -> None:
        self._channels[channel](str(payload))

    async def _keep(self, connection: "asyncpg.Connection[Any] | None") -> None:
        while True:
            try:
                connection = connection or await self._connect()
                await self._use(connection)
            except Troubles as error:
                log.warning("listening again", error=repr(error))
            connection = None
            await asyncio.sleep(PAUSE_SECONDS)

    async def _use(self, connection: "asyncpg.Connection[Any]") -> None:
        """Listen until the connection breaks; nobody else uses it."""
        self._listening.clear()
        self._server_process = connection.get_server_pid()
        connection.add_termination_listener(lambda _: self._asked.set())
        try:
            while True:
                self._asked.clear()
                for channel in self._channels.keys() - self._listening:
                    await connection.execute(_SHOW, channel)
                    await connection.add_listener(channel, self._heard)
                    self._listening.add(channel)
                    self._missed()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(PING_SECONDS):
                        await self._asked.wait()
                await connection.execute("SELECT 1")
        finally:
            connection.terminate()
