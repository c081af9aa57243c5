"""The protocol of a store of uploads, and its errors."""

import errno
import re
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import structlog

from app.uploads.names import FALLBACK

log = structlog.get_logger(__name__)

# The errors of a full disk, an exhausted quota and a file-size limit (errno(3)).
DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


def checked_id(upload_id: str) -> str:
    """Return the id if it is a lower-case UUID (RFC 9562, section 4), which is a safe file name.

    Raises NoSuchUpload for anything else, because no upload ever had such an id.
    """
    if not _ID.fullmatch(upload_id):
        raise NoSuchUpload
    return upload_id


@dataclass(frozen=True)
class Received:
    """The size of an upload in bytes, and its SHA-256 in hexadecimal."""

    size: int
    sha256: str


class Store(Protocol):
    """Stores uploads by their id.

    An upload is *received* once its bytes are durable, and *published* once a task has checked
    them. The effect of a method survives a power cut as soon as the method returns. Each method may
    be repeated after a crash.

    All methods raise StoreFull or StoreUnavailable if the disk or S3 refuses, and NoSuchUpload for
    an id that is not a lower-case UUID.
    """

    async def receive(
        self, upload_id: str, chunks: AsyncIterator[bytes], *, limit: int, filename: str = FALLBACK
    ) -> Received:
        """Store a stream of at most `limit` bytes.

        `filename` is the name under which a browser saves the file from a signed address. Raises
        UploadTooLarge for a longer stream, and any error of `chunks`. After an error or a
        cancellation the store has nothing of the upload.
        """
        ...

    async def head(self, upload_id: str, size: int = 8192) -> bytes:
        """Return the first `size` bytes of a received or published upload. Raises NoSuchUpload."""
        ...

    def as_file(self, upload_id: str) -> AbstractAsyncContextManager[Path]:
        """Provide a received or published upload as a file on this machine, during the block.

        Raises NoSuchUpload.
        """
        ...

    async def publish(self, upload_id: str) -> None:
        """Make a received upload a published one. Raises NoSuchUpload."""
        ...

    async def read(self, upload_id: str, start: int, end: int) -> bytes:
        """Return the bytes of a published upload from `start` up to, but without, `end`.

        Callers read a large upload piece by piece, so that it is never in memory as a whole. Raises
        NoSuchUpload.
        """
        ...

    async def signed_address(self, upload_id: str, seconds: float) -> str | None:
        """Return a URL from which a published upload can be fetched, without this service.

        It is valid for so many seconds. None if the store has no such URLs. Raises NoSuchUpload.
        """
        ...

    async def save_thumbnail(self, upload_id: str, data: bytes) -> None:
        """Store an upload's thumbnail, in the place of an earlier one."""
        ...

    async def thumbnail(self, upload_id: str) -> bytes:
        """Return an upload's thumbnail. Raises NoSuchUpload if it has none."""
        ...

    async def delete(self, upload_id: str) -> None:
        """Remove an upload and its thumbnail, if they exist."""
        ...

    async def sweep(self, older_than: float) -> int:
        """Remove half-written files that a crash left behind, and return their number.

        Such a file has not changed for `older_than` seconds, which must be more than a client may
        pause, and no process is writing it.
        """
        ...

    async def check(self) -> bool:
        """Return whether the store accepts a write now. Leaves nothing behind."""
        ...


class CheckLog:
    """Logs why a store's check fails, once for each reason, and that it passes again."""

    def __init__(self) -> None:
        self._reason: str | None = None

    def failed(self, error: "StoreError") -> bool:
        """Record that a check failed. Return False, its result."""
        reason, before = reason_of(error), self._reason
        self._reason = reason
        if reason != before:
            log.error("uploads cannot be stored", reason=reason)
        return False

    def passed(self) -> bool:
        """Record that a check passed. Return True, its result."""
        if self._reason is not None:
            self._reason = None
            log.info("uploads can be stored again")
        return True


# Advice to the operator for each error of the operating system.
_ADVICE = {
    errno.ENOSPC: "free some space, or some inodes",
    errno.EDQUOT: "raise the quota of this user",
    errno.EFBIG: "raise the limit of the size of a file (ulimit -f)",
    errno.EACCES: "let the user of this process write there",
    errno.EPERM: "let the user of this process write there",
    errno.EROFS: "mount the file system writable",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "raise the limit of open files of this machine (fs.file-max)",
    errno.ENOTDIR: "name a directory, not a file",
    errno.ENOENT: "make the directory that a symbolic link leads to",
    errno.EIO: "look at the disk, whose reads or writes fail",
    errno.ESTALE: "mount the network file system again",
}


def reason_of(error: Exception) -> str:
    """Return the cause of an error as one line for the log, with advice to the operator.

    For example "EROFS: Read-only file system: /srv/uploads/incoming; mount the file system
    writable".
    """
    cause = error.__cause__ or error
    if not isinstance(cause, OSError) or cause.errno is None:
        return repr(cause)
    parts = [errno.errorcode.get(cause.errno, str(cause.errno)), cause.strerror or ""]
    line = ": ".join([*parts, *([str(cause.filename)] if cause.filename else [])])
    return "; ".join([line, *([_ADVICE[cause.errno]] if cause.errno in _ADVICE else [])])


class StoreError(Exception):
    """The store cannot do this."""

    def __init__(self, message: str | None = None) -> None:
        super().__init__(message or self.__doc__)


class CannotOpenStore(StoreError):
    """The store cannot be used with these settings."""


class UploadTooLarge(StoreError):
    """The file is larger than this service takes."""


class StoreFull(StoreError):
    """There is no room for the file at the moment."""


class StoreUnavailable(StoreError):
    """Files cannot be stored or read at the moment."""


class NoSuchUpload(StoreError):
    """There is no such upload."""
