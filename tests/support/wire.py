"""HTTP requests as raw bytes, also malformed requests that no client library writes."""

import re
import socket
from dataclasses import dataclass
from functools import cached_property

_HEAD = re.compile(rb"HTTP/1\.1 (\d{3}) [^\r\n]*\r\n((?:[^\r\n]+\r\n)*)\r\n")


@dataclass(frozen=True)
class Response:
    """An HTTP response, parsed."""

    status: int
    headers: dict[str, str]
    body: bytes


@dataclass(frozen=True)
class Said:
    """All bytes from the server, and whether it closed the connection after them."""

    raw: bytes
    closed: bool

    @cached_property
    def responses(self) -> list[Response]:
        """The bytes as responses with a Content-Length. Raise AssertionError for anything else."""
        found, rest = [], self.raw
        while rest:
            head = _HEAD.match(rest)
            assert head, f"no HTTP: {rest[:200]!r}"
            lines = head[2].decode("latin-1").lower().splitlines()
            headers = dict(line.split(": ", 1) for line in lines)
            end = head.end() + int(headers.get("content-length", "0"))
            found.append(Response(int(head[1]), headers, rest[head.end() : end]))
            rest = rest[end:]
        return found

    @property
    def statuses(self) -> list[int]:
        """The statuses of the responses, in order."""
        return [response.status for response in self.responses]


def say(port: int, request: bytes, *, patience: float = 5.0) -> Said:
    """Send raw bytes, then read until the server closes or is silent for `patience` seconds."""
    heard, closed = b"", True
    with socket.create_connection(("127.0.0.1", port), timeout=patience) as connection:
        try:
            connection.sendall(request)
        except ConnectionError:
            pass  # the server has closed the connection; its answer may still be readable
        except TimeoutError:
            closed = False
        try:
            while block := connection.recv(1 << 16):
                heard += block
        except TimeoutError:
            closed = False
        except ConnectionError:
            pass
    return Said(heard, closed)
