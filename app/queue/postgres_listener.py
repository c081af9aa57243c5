"""A connection that hears what other sessions notify (LISTEN); if it breaks, another is opened."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Any

import asyncpg
import structlog

from app.queue.postgres_schema import Troubles

PING_SECONDS = 5.0  # how soon a connection that died silently is missed
PAUSE_SECONDS = 1.0  # between two tries to connect

Connect = Callable[[], Awaitable["asyncpg.Connection[Any]"]]

log = structlog.get_logger(__name__)


class Listener:
    """Calls back with each payload of the channels that are listened to.

    While there is no connection nothing is heard; `missed` is called once there is one again.
    """

    def __init__(self, connect: Connect, missed: Callable[[], None]) -> None:
        self._connect = connect
        self._missed = missed
        self._channels: dict[str, Callable[[str], None]] = {}
        self._listening: set[str] = set()
        self._asked = asyncio.Event()
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
        connection.add_termination_listener(lambda _: self._asked.set())
        try:
            while True:
                self._asked.clear()
                for channel in self._channels.keys() - self._listening:
                    await connection.add_listener(channel, self._heard)
                    self._listening.add(channel)
                    self._missed()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._asked.wait(), PING_SECONDS)
                await connection.execute("SELECT 1")
        finally:
            connection.terminate()
