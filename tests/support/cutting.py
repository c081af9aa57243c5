"""A proxy in front of PostgreSQL that forwards a COMMIT and loses PostgreSQL's answer to it."""

import asyncio
import contextlib
import threading
from collections.abc import Coroutine
from typing import Any, Self

from tests.support.service import free_port, wait_until_open

ANSWERED_SECONDS = 5.0  # how long PostgreSQL has to answer before the connection is cut anyway

_COMMIT = b"COMMIT"


class CuttingProxy:
    """Listens at `port` on loopback, and forwards everything to PostgreSQL at the port `to`.

    `lose_commit_of` and `lose_answer` choose the next connection to cut. `cuts` counts the cuts.
    """

    def __init__(self, to: int) -> None:
        self.port = free_port()
        self.cuts = 0
        self._to = to
        self._mark: bytes | None = None
        self._messages: int | None = None
        self._connections = set[asyncio.Task[None]]()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        """Start listening."""
        self._thread.start()
        wait_until_open(self.port)
        return self

    def __exit__(self, *_: object) -> None:
        """Stop, and cut every connection."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def lose_commit_of(self, mark: bytes) -> None:
        """Cut the connection that sends the bytes `mark`, after PostgreSQL ran its next COMMIT.

        The client does not get the answer to that COMMIT.
        """
        self._mark, self._messages = mark, None

    def lose_answer(self, messages: int) -> None:
        """Count the messages of all clients, and cut the connection of the last of `messages`.

        PostgreSQL carries that message out, and the client does not get the answer.
        """
        self._mark, self._messages = None, messages

    def stop_cutting(self) -> None:
        """Forget which connection was to be cut."""
        self._mark = self._messages = None

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        listening: Coroutine[Any, Any, asyncio.Server] = asyncio.start_server(
            self._connected, "127.0.0.1", self.port
        )
        server = self._loop.run_until_complete(listening)
        self._loop.run_forever()
        server.close()
        for connection in asyncio.all_tasks(self._loop):
            connection.cancel()
        self._loop.run_until_complete(asyncio.sleep(0.01))
        self._loop.close()

    async def _connected(self, client: asyncio.StreamReader, out: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.CancelledError):
            postgres, into = await asyncio.open_connection("127.0.0.1", self._to)
            cut, answered = asyncio.Event(), asyncio.Event()
            directions = [
                asyncio.create_task(self._forward(client, into, cut, answered)),
                asyncio.create_task(_return_answers(postgres, out, cut, answered)),
            ]
            try:
                await asyncio.wait(directions, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for direction in directions:
                    direction.cancel()
                await asyncio.gather(*directions, return_exceptions=True)
                into.transport.abort()
                out.transport.abort()

    async def _forward(
        self,
        client: asyncio.StreamReader,
        into: asyncio.StreamWriter,
        cut: asyncio.Event,
        answered: asyncio.Event,
    ) -> None:
        marked = False
        while data := await client.read(65536):
            marked = marked or (self._mark is not None and self._mark in data)
            if self._should_cut(marked and _COMMIT in data):
                self.stop_cutting()
                self.cuts += 1
                cut.set()
            into.write(data)
            await into.drain()
            if cut.is_set():
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(answered.wait(), ANSWERED_SECONDS)
                return

    def _should_cut(self, commits_marked: bool) -> bool:
        if self._messages is not None:
            self._messages -= 1
            return self._messages <= 0
        return commits_marked


async def _return_answers(
    postgres: asyncio.StreamReader,
    out: asyncio.StreamWriter,
    cut: asyncio.Event,
    answered: asyncio.Event,
) -> None:
    while data := await postgres.read(65536):
        if cut.is_set():
            answered.set()
            return
        out.write(data)
        await out.drain()
