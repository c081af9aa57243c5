"""A text file that lines are appended to."""

import asyncio
import os
import time
from pathlib import Path

LOOK_AGAIN_SECONDS = 1.0  # how soon a file that was moved away (rotated) is noticed


class LogFile:
    """Appends lines to a file; those of one turn of the event loop go out in one write.

    An append reaches the operating system's cache in microseconds, so it is made right on the
    event loop: a thread for each line would cost fifty times as much.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._waiting: list[tuple[bytes, asyncio.Future[None]]] = []
        self._descriptor: int | None = None
        self._opened_at = 0.0

    async def append(self, text: str) -> None:
        """Append one line; whatever could break it or command a terminal is escaped.

        Raises OSError if the file cannot be written.
        """
        line = text if text.isprintable() else text.encode("unicode_escape").decode("ascii")
        loop = asyncio.get_running_loop()
        written = loop.create_future()
        if not self._waiting:
            loop.call_soon(self._write)
        self._waiting.append((line.encode() + b"\n", written))
        await written

    def close(self) -> None:
        """Close the file, if it is open."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _write(self) -> None:
        waiting, self._waiting = self._waiting, []
        failure = None
        try:
            os.write(self._open(), b"".join(line for line, _ in waiting))
        except OSError as error:
            failure = error
        for _, written in waiting:
            if written.done():  # its task was cancelled
                continue
            if failure is None:
                written.set_result(None)
            else:
                written.set_exception(failure)

    def _open(self) -> int:
        now = time.monotonic()
        if self._descriptor is None or now - self._opened_at > LOOK_AGAIN_SECONDS:
            self.close()
            self._path.parent.mkdir(parents=True, exist_ok=True)
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
            self._descriptor = os.open(self._path, flags, 0o600)
            self._opened_at = now
        return self._descriptor
