"""Requests at a steady pace, each of them timed: for what a service does while it keeps up."""

import asyncio
import re
import time
from asyncio import StreamReader, StreamWriter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

import uvloop

from benchmarks.harness import Failed

BODY = b'{"subject": "Hello", "message": "It is done."}'
REQUEST = (
    b"POST /send-notification/%b HTTP/1.1\r\nHost: localhost\r\n"
    b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%b"
)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Answer:
    """A 202."""

    recipient: str
    seconds: float  # that it took
    at: float  # time.time() when it came


def send_requests(port: int, *, rate: int, seconds: int) -> list[Answer]:
    """Send so many requests a second, each for a recipient of its own.

    Raises Failed, in a group, for an answer that is no 202.
    """
    client = _Client(port)
    return uvloop.run(at_pace(client.post, rate=rate, seconds=seconds))


async def at_pace(act: Callable[[int], Awaitable[T]], *, rate: int, seconds: int) -> list[T]:
    """Call `act` with 0, 1, and so on, so often a second, whether those before have ended or not.

    Whoever waits for an answer before the next request asks less of a slow service than of a fast
    one.
    """
    loop = asyncio.get_running_loop()
    began = loop.time()

    async def when_due(number: int) -> T:
        await asyncio.sleep(began + number / rate - loop.time())
        return await act(number)

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(when_due(number)) for number in range(rate * seconds)]
    return [task.result() for task in tasks]


class _Client:
    """Has as many connections as it needs at once, and keeps them."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._idle: list[tuple[StreamReader, StreamWriter]] = []

    async def post(self, number: int) -> Answer:
        recipient = f"user{number}@example.com"
        began = time.perf_counter()
        reader, writer = self._warm() or await self._connect()
        writer.write(REQUEST % (recipient.encode(), len(BODY), BODY))
        head = await reader.readuntil(b"\r\n\r\n")
        answer = Answer(recipient, time.perf_counter() - began, time.time())
        length = re.search(rb"content-length: (\d+)", head)
        if not head.startswith(b"HTTP/1.1 202 ") or length is None:
            raise Failed(f"not every request was accepted: {head!r}")
        await reader.readexactly(int(length[1]))
        self._idle.append((reader, writer))
        return answer

    def _warm(self) -> tuple[StreamReader, StreamWriter] | None:
        while self._idle:
            reader, writer = self._idle.pop()
            if not reader.at_eof():  # the server ends what was idle for some seconds
                return reader, writer
        return None

    async def _connect(self) -> tuple[StreamReader, StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self._port)
