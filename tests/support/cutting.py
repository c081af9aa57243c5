"""A proxy before PostgreSQL that passes a COMMIT on, and loses the answer to it."""

import asyncio
import contextlib
import threading
from collections.abc import Coroutine
from typing import Any, Self

from tests.support.service import free_port, wait_until_open

ANSWERED_SECONDS = 5.0  # in which PostgreSQL answers before its connection is cut

_COMMIT = b"COMMIT"


class CuttingProxy:
    """Listens at `port`, and passes everything on to PostgreSQL at another port of loopback.

    `lose_commit_of` and `lose_answer` choose one connection that is cut, once.
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
        """Begin to listen."""
        self._thread.start()
        wait_until_open(self.port)
        return self

    def __exit__(self, *_: object) -> None:
        """End, and cut every connection."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def lose_commit_of(self, mark: bytes) -> None:
        """Cut the connection that has sent `mark`, once its next COMMIT is carried out."""
        self._mark, self._messages = mark, None

    def lose_answer(self, messages: int) -> None:
        """Cut the connection that sends the last of so many messages, once that is carried out."""
        self._mark, self._messages = None, messages

    def let_be(self) -> None:
        """Cut nothing that is not cut yet."""
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
            ways = [
                asyncio.create_task(self._pass_on(client, into, cut, answered)),
                asyncio.create_task(_pass_back(postgres, out, cut, answered)),
            ]
            try:
                await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for way in ways:
                    way.cancel()
                await asyncio.gather(*ways, return_exceptions=True)
                into.transport.abort()
                out.transport.abort()

    async def _pass_on(
        self,
        client: asyncio.StreamReader,
        into: asyncio.StreamWriter,
        cut: asyncio.Event,
        answered: asyncio.Event,
    ) -> None:
        marked = False
        while data := await client.read(65536):
            marked = marked or (self._mark is not None and self._mark in data)
            if self._is_last(marked and _COMMIT in data):
                self.let_be()
                self.cuts += 1
                cut.set()
            into.write(data)
            await into.drain()
            if cut.is_set():
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(answered.wait(), ANSWERED_SECONDS)
                return

    def _is_last(self, commits_the_marked: bool) -> bool:
        if self._messages is not None:
            self._messages -= 1
            return self._messages <= 0
        return commits_the_marked


async def _pass_back(
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
