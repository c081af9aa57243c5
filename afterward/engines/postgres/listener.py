"""Receives notifications of other sessions (LISTEN), and reconnects when the connection breaks."""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import asyncpg
import structlog

from afterward.engines.postgres.connections import DATABASE_ERRORS, Session

PING_SECONDS = 5.0  # between two checks that the connection still works
PAUSE_SECONDS = 1.0  # before another try to connect

Connect = Callable[[], Awaitable["asyncpg.Connection[Any]"]]
Receive = Callable[[str], None]
OnGap = Callable[[float], None]

# PostgreSQL does not tell which sessions listen to a channel. So each listening session also holds
# a shared advisory lock for the channel, and other sessions find this lock in pg_locks.
_MARK_AS_LISTENING = "SELECT pg_advisory_lock_shared(hashtext($1))"

# Send payloads to a channel, if a process other than this one listens to it. Parameters:
# $1 the channel, $2 the payloads, $3 the server process of our own listening connection.
_NOTIFY_IF_HEARD = """
SELECT pg_notify($1, payload) FROM unnest($2::text[]) AS payload
WHERE EXISTS (
    SELECT FROM pg_locks
    WHERE locktype = 'advisory' AND objid = hashtext($1)::oid AND pid IS DISTINCT FROM $3
    -- pg_locks shows the locks of all databases.
    AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
)
"""

log = structlog.get_logger(__name__)


class ListeningConnection:
    """Calls a function with each payload that arrives on a channel.

    If the connection breaks, it opens another one. Notifications that are sent in between are lost,
    so it calls `on_gap` of a channel each time it has begun to listen to it. The first gap begins
    at `worked_at`.
    """

    def __init__(self, connect: Connect, worked_at: float) -> None:
        self._connect = connect
        self.worked_at = worked_at
        """When a connection was last known to work, in seconds since the epoch."""
        self._channels: dict[str, tuple[Receive, OnGap]] = {}
        self._listening: set[str] = set()
        self._wake = asyncio.Event()
        self._server_process: int | None = None
        self._task: asyncio.Task[None]

    def start(self, connection: "asyncpg.Connection[Any]") -> None:
        """Listen on this connection, and on a new one when it breaks."""
        self._task = asyncio.create_task(self._keep_listening(connection), name="listener")

    async def stop(self) -> None:
        """Close the connection."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    def listen(self, channel: str, receive: Receive, on_gap: OnGap) -> None:
        """Call `receive` with each payload of this channel, beginning soon after this call.

        `on_gap` gets the time since which payloads may be lost, in seconds since the epoch.
        """
        self._channels[channel] = receive, on_gap
        self._wake.set()

    async def notify(self, session: Session, channel: str, payloads: Sequence[str]) -> bool:
        """Send payloads to a channel if another process listens to it. Returns whether one does."""
        return bool(await session.fetch(_NOTIFY_IF_HEARD, channel, payloads, self._server_process))

    def _receive(self, _: object, __: object, channel: str, payload: object) -> None:
        receive, _ = self._channels[channel]
        receive(str(payload))

    async def _keep_listening(self, connection: "asyncpg.Connection[Any] | None") -> None:
        while True:
            try:
                connection = connection or await self._connect()
                await self._listen_until_broken(connection)
            except DATABASE_ERRORS as error:
                with contextlib.suppress(Exception):  # the disk of the log may be full
                    log.warning(
                        "the listening connection broke, connecting again", error=repr(error)
                    )
            connection = None
            await asyncio.sleep(PAUSE_SECONDS)

    async def _listen_until_broken(self, connection: "asyncpg.Connection[Any]") -> None:
        self._listening.clear()
        self._server_process = connection.get_server_pid()
        connection.add_termination_listener(lambda _: self._wake.set())
        try:
            while True:
                self._wake.clear()
                # 1. Begin to listen to new channels: to all of them on a new connection.
                for channel in self._channels.keys() - self._listening:
                    await connection.execute(_MARK_AS_LISTENING, channel)
                    await connection.add_listener(channel, self._receive)
                    self._listening.add(channel)
                    _, on_gap = self._channels[channel]
                    on_gap(self.worked_at)
                # 2. Wait for another channel, for the end of the connection, or for the next ping.
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(PING_SECONDS):
                        await self._wake.wait()
                # 3. Ping the server. This raises an error if the connection is broken.
                pinged_at = time.time()
                await connection.execute("SELECT 1")
                self.worked_at = pinged_at
        finally:
            connection.terminate()
