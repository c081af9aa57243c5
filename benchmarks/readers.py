"""Clients in a separate process that hold an event stream open, and read all of it."""

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import uvloop

from benchmarks.harness import Failed
from benchmarks.load import ROOT

OPEN_SECONDS = 20.0  # until every client has the head of its response


@contextmanager
def readers(port: int, path: str, number: int) -> Iterator[None]:
    """Hold `number` streams open in a block. Raise Failed if one of them ends, or tells nothing."""
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.readers", str(port), path, str(number)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            if json.loads(process.stdout.readline() or b"0") != number:
                raise Failed(f"not all of {number} clients could open {path}")
            yield
            process.stdin.close()  # the process tells what it has read, and ends
            read = json.loads(process.stdout.readline())
            if read["ended"] or read["silent"]:
                raise Failed(f"of {number} clients of {path}: {read}")
        finally:
            process.terminate()


# The process


@dataclass(slots=True)
class Client(asyncio.Protocol):
    """A client that counts the bytes after the head of its response."""

    opened: asyncio.Event
    read: int = -1  # -1 until the head has arrived
    ended: bool = False

    def data_received(self, data: bytes) -> None:
        """Count."""
        if self.read < 0 and data.startswith(b"HTTP/1.1 200 "):
            self.read = 0
            self.opened.set()
        elif self.read >= 0:
            self.read += len(data)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        """Note it."""
        self.ended = True


async def follow(port: int, path: str, number: int) -> None:
    """Open the streams, print their number, and read until standard input closes."""
    loop = asyncio.get_running_loop()
    request = f"GET {path} HTTP/1.1\r\nHost: localhost\r\nAccept: text/event-stream\r\n\r\n"
    clients = []
    for _ in range(number):
        transport, client = await loop.create_connection(
            lambda: Client(asyncio.Event()), "127.0.0.1", port
        )
        transport.write(request.encode())
        clients.append(client)
    async with asyncio.timeout(OPEN_SECONDS):
        for client in clients:
            await client.opened.wait()
    print(len(clients), flush=True)
    await loop.run_in_executor(None, sys.stdin.read)
    counts = {
        "bytes": sum(client.read for client in clients),
        "ended": sum(client.ended for client in clients),
        "silent": sum(client.read <= 0 for client in clients),
    }
    print(json.dumps(counts), flush=True)


if __name__ == "__main__":
    uvloop.run(follow(int(sys.argv[1]), sys.argv[2], int(sys.argv[3])))
