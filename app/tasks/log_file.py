"""A text file to which courtesies append lines."""

import errno
import os
import time
from pathlib import Path

LOOK_AGAIN_SECONDS = 1.0  # the file is opened again after so long, in case it was rotated


class LogFile:
    """Appends lines to a file, each with one write.

    A write reaches the page cache in microseconds, so it happens on the event loop. When a thread
    wrote each line, the service accepted two fifths fewer requests.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor: int | None = None
        self._opened_at = 0.0
        self._last_was_cut = False  # whether the last line was written only in part

    def append(self, text: str) -> None:
        """Append one line. Line breaks and terminal control sequences in it are escaped.

        Raises OSError if the file cannot be written. On a full disk the system may write only a
        part of the line; then the next call begins a new line first.
        """
        line = text if text.isprintable() else text.encode("unicode_escape").decode("ascii")
        data = b"\n" * self._last_was_cut + line.encode() + b"\n"
        self._last_was_cut = os.write(self._open(), data) < len(data)
        if self._last_was_cut:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def close(self) -> None:
        """Close the file, if it is open."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _open(self) -> int:
        now = time.monotonic()
        if self._descriptor is None or now - self._opened_at > LOOK_AGAIN_SECONDS:
            self.close()
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
            self._descriptor = os.open(self._path, flags, 0o600)
            self._opened_at = now
        return self._descriptor
