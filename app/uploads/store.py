"""What every store of uploads can do, whichever medium it writes to."""

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

# What the system says when a disk has no room (errno(3)).
DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


def open_store(url: str) -> "Store":
    """The store that a URL names: `file:var/uploads`, `file:/var/uploads`, `s3://bucket/prefix`.

    A file: URL is as in RFC 8089; a prefix may be left out. Nothing is touched until the store is
    used. Raises ValueError for a URL that names no store, and CannotOpenStore.
    """
    scheme, _, place = url.partition(":")
    if scheme == "s3" and re.match("//[^/]", place):
        bucket, _, prefix = place.removeprefix("//").partition("/")
        try:
            from app.uploads.s3 import S3Store
        except ModuleNotFoundError as error:
            raise CannotOpenStore(
                f"UPLOAD_URL: S3 needs {error.name}: run pip install {error.name}"
            ) from error
        return S3Store(bucket, prefix.rstrip("/"))
    if scheme != "file":
        raise ValueError("An upload store's URL begins with file: or s3://")
    if not place or re.match("//[^/]", place):
        raise ValueError("A file: URL is file:relative/path or file:/absolute/path")
    from app.uploads.local import LocalStore

    return LocalStore(Path(place))


def checked_id(upload_id: str) -> str:
    """Returns an id that is safe as a name in any store: a lower-case UUID (RFC 9562, section 4).

    Raises NoSuchUpload for anything else: what we never named does not exist.
    """
    if not _ID.fullmatch(upload_id):
        raise NoSuchUpload
    return upload_id


@dataclass(frozen=True)
class Received:
    """What arrived: its size in bytes, and its SHA-256 in hexadecimal."""

    size: int
    sha256: str


class Store(Protocol):
    """Keeps uploads by their id.

    An upload is *received* once its bytes are durable, and *published* once somebody has checked
    them. Each verb's effect survives a power cut as soon as the verb returns, and each may be
    repeated after a crash. Every verb raises StoreFull or StoreUnavailable when the medium
    refuses, and NoSuchUpload for an id that is not one of ours.
    """

    async def receive(
        self, upload_id: str, chunks: AsyncIterator[bytes], *, limit: int, filename: str = FALLBACK
    ) -> Received:
        """Stores a stream of at most `limit` bytes.

        `filename` is the name under which the file is saved that a signed address leads to.
        Raises UploadTooLarge beyond that, and passes on whatever `chunks` raises. After an error
        or a cancellation nothing is kept.
        """
        ...

    async def head(self, upload_id: str, size: int = 8192) -> bytes:
        """The first `size` bytes, received or published. Raises NoSuchUpload."""
        ...

    def as_file(self, upload_id: str) -> AbstractAsyncContextManager[Path]:
        """The bytes, received or published, as a file to read on this machine meanwhile.

        Raises NoSuchUpload.
        """
        ...

    async def publish(self, upload_id: str) -> None:
        """Moves a received upload to the published ones. Raises NoSuchUpload."""
        ...

    async def read(self, upload_id: str, start: int, end: int) -> bytes:
        """Some bytes of a published upload: from `start` to `end`, which is the first one after.

        A large one is read piece by piece, so that it is never in memory. Raises NoSuchUpload.
        """
        ...

    async def signed_address(self, upload_id: str, seconds: float) -> str | None:
        """Where anybody can fetch a published upload for so many seconds, without asking us.

        None if the medium has no such addresses. Raises NoSuchUpload.
        """
        ...

    async def save_thumbnail(self, upload_id: str, data: bytes) -> None:
        """Stores an upload's thumbnail, in the place of an earlier one."""
        ...

    async def thumbnail(self, upload_id: str) -> bytes:
        """An upload's thumbnail. Raises NoSuchUpload if it has none."""
        ...

    async def delete(self, upload_id: str) -> None:
        """Removes an upload and its thumbnail, if they are there."""
        ...

    async def sweep(self, older_than: float) -> int:
        """Removes files that a crash left half-written; returns how many.

        They are untouched for so many seconds, which is longer than a client may pause, and no
        process writes them.
        """
        ...

    async def check(self) -> bool:
        """Whether something could be stored right now. Leaves no trace."""
        ...


class CheckLog:
    """Logs why a store's check fails, once for each reason, and when it passes again."""

    def __init__(self) -> None:
        self._reason: str | None = None

    def failed(self, error: "StoreError") -> bool:
        """Notes a check that failed; returns False, its result."""
        reason, before = reason_of(error), self._reason
        self._reason = reason
        if reason != before:
            log.error("uploads cannot be stored", reason=reason)
        return False

    def passed(self) -> bool:
        """Notes a check that passed; returns True, its result."""
        if self._reason is not None:
            self._reason = None
            log.info("uploads can be stored again")
        return True


# What an operator can do about an error of the system.
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
    """Returns the cause of an error in one line for the log, and what to do about it.

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
    """The store could not do it."""

    def __init__(self, message: str | None = None) -> None:
        super().__init__(message or self.__doc__)


class CannotOpenStore(StoreError):
    """The store cannot be used as it is set up."""


class UploadTooLarge(StoreError):
    """The file is larger than this service takes."""


class StoreFull(StoreError):
    """There is no room for the file at the moment."""


class StoreUnavailable(StoreError):
    """Files cannot be stored or read at the moment."""


class NoSuchUpload(StoreError):
    """There is no such upload."""
