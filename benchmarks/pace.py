"""Send requests at a fixed rate, and time each of them."""

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
    """An answer with the status 202."""

    recipient: str
    seconds: float  # from the request to the answer
    at: float  # time.time() at its arrival


def send_requests(port: int, *, rate: int, seconds: int) -> list[Answer]:
    """Send `rate` requests a second, each for a different recipient; return the answers.

    Raise an ExceptionGroup with Failed for an answer other than a 202.
    """
    client = _Client(port)
    return uvloop.run(at_pace(client.post, rate=rate, seconds=seconds))


async def at_pace(act: Callable[[int], Awaitable[T]], *, rate: int, seconds: int) -> list[T]:
    """Call `act` with 0, 1, 2, … at a fixed rate, without waiting for earlier calls.

    A client that waited for each answer would send fewer requests to a slow service than to a fast
    service, and so hide the slowness.
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
    """An HTTP client that opens a connection whenever none is idle, and reuses them."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._idle: list[tuple[StreamReader, StreamWriter]] = []

    async def post(self, number: int) -> Answer:
        recipient = f"user{number}@example.com"
        began = time.perf_counter()
        reader, writer = self._idle_connection() or await self._connect()
        writer.write(REQUEST % (recipient.encode(), len(BODY), BODY))
        head = await reader.readuntil(b"\r\n\r\n")
        answer = Answer(recipient, time.perf_counter() - began, time.time())
        length = re.search(rb"content-length: (\d+)", head)
        if not head.startswith(b"HTTP/1.1 202 ") or length is None:
            raise Failed(f"not every request was accepted: {head!r}")
        await reader.readexactly(int(length[1]))
        self._idle.append((reader, writer))
        return answer

    def _idle_connection(self) -> tuple[StreamReader, StreamWriter] | None:
        while self._idle:
            reader, writer = self._idle.pop()
            if not reader.at_eof():  # the server closes connections that were idle for some seconds
                return reader, writer
        return None

    async def _connect(self) -> tuple[StreamReader, StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self._port)
