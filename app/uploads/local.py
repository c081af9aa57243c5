"""A store of uploads in a directory of this machine.

incoming/    being written; a crash leaves files here, and `sweep` removes them
received/    whole and durable, under our own id
published/   checked as well
thumbnails/  small pictures of them
"""

import asyncio
import errno
import fcntl
import os
import re
import stat
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from functools import cache
from pathlib import Path
from typing import TypeVar, TypeVarTuple

import structlog

from app.uploads.incoming import BLOCK, bring_in
from app.uploads.names import FALLBACK
from app.uploads.store import (
    DISK_FULL,
    CheckLog,
    NoSuchUpload,
    Received,
    StoreError,
    StoreFull,
    StoreUnavailable,
    checked_id,
)

_INCOMING_NAME = re.compile(r"[0-9a-f]{32}")
# What file systems say that cannot sync a directory: SMB, shared folders of virtual machines, FUSE.
_CANNOT_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF}

log = structlog.get_logger(__name__)

_Arguments = TypeVarTuple("_Arguments")
_Result = TypeVar("_Result")


class LocalStore:
    """A `Store` whose uploads are files below `root`, which only this user can read."""

    def __init__(self, root: Path) -> None:
        # The working directory may change; the uploads stay where they are.
        root = root.absolute()
        self._incoming = root / "incoming"
        self._received = root / "received"
        self._published = root / "published"
        self._thumbnails = root / "thumbnails"
        self._told: set[str] = set()  # names in incoming/ that were logged
        self._checks = CheckLog()

    async def receive(
        self,
        upload_id: str,
        chunks: AsyncIterator[bytes],
        *,
        limit: int,
        filename: str = FALLBACK,  # noqa: ARG002 - there are no signed addresses
    ) -> Received:
        """See `Store.receive`."""
        return await self._bring_in(self._received / checked_id(upload_id), chunks, limit)

    async def _bring_in(self, target: Path, chunks: AsyncIterator[bytes], limit: int) -> Received:
        await _in_thread(self._make_folders)
        return await bring_in(_IncomingFile(self._incoming, target), chunks, limit=limit)

    async def head(self, upload_id: str, size: int = 8192) -> bytes:
        """See `Store.head`."""
        return await _in_thread(self._head, checked_id(upload_id), size)

    def _head(self, upload_id: str, size: int) -> bytes:
        return _read(self._find(upload_id), 0, size)

    @asynccontextmanager
    async def as_file(self, upload_id: str) -> AsyncIterator[Path]:
        """See `Store.as_file`. Here it is the file itself."""
        yield await _in_thread(self._find, checked_id(upload_id))

    def _find(self, upload_id: str) -> Path:
        with suppress(NoSuchUpload):
            return _regular(self._received / upload_id)
        return _regular(self._published / upload_id)

    async def publish(self, upload_id: str) -> None:
        """See `Store.publish`."""
        await _in_thread(self._publish, checked_id(upload_id))

    def _publish(self, upload_id: str) -> None:
        self._make_folders()
        target = self._published / upload_id
        try:
            (self._received / upload_id).rename(target)
        except FileNotFoundError:
            # An earlier attempt may have crashed between its rename and its fsync.
            _regular(target)
        _sync_folder(self._published)
        _sync_folder(self._received)

    async def read(self, upload_id: str, start: int, end: int) -> bytes:
        """See `Store.read`."""
        return await _in_thread(_read, self._published / checked_id(upload_id), start, end)

    async def signed_address(self, upload_id: str, seconds: float) -> None:  # noqa: ARG002
        """See `Store.signed_address`. There are none: only we can read a file of ours."""
        checked_id(upload_id)

    async def save_thumbnail(self, upload_id: str, data: bytes) -> None:
        """See `Store.save_thumbnail`."""

        async def whole() -> AsyncIterator[bytes]:
            yield data

        await self._bring_in(self._thumbnails / checked_id(upload_id), whole(), len(data))

    async def thumbnail(self, upload_id: str) -> bytes:
        """See `Store.thumbnail`."""
        return await _in_thread(_read, self._thumbnails / checked_id(upload_id))

    async def delete(self, upload_id: str) -> None:
        """See `Store.delete`."""
        await _in_thread(self._delete, checked_id(upload_id))

    def _delete(self, upload_id: str) -> None:
        for folder in (self._received, self._published, self._thumbnails):
            with suppress(FileNotFoundError):
                (folder / upload_id).unlink()
                _sync_folder(folder)

    async def sweep(self, older_than: float) -> int:
        """See `Store.sweep`."""
        return await _in_thread(self._sweep, older_than)

    def _sweep(self, older_than: float) -> int:
        return sum(map(self._remove_abandoned, _untouched(self._incoming, older_than)))

    def _remove_abandoned(self, path: Path) -> bool:
        """Removes a file unless it is in use; one that cannot be removed is logged once."""
        try:
            if not _INCOMING_NAME.fullmatch(path.name):
                raise OSError(errno.EINVAL, "it has no name of this service")
            if _is_being_written(path):
                return False
            path.unlink()
        except FileNotFoundError:
            return False
        except OSError as error:
            if path.name not in self._told:
                self._told.add(path.name)
                log.warning("cannot be swept", path=str(path), reason=error.strerror)
            return False
        log.info("half-written upload removed", file=path.name)
        return True

    async def check(self) -> bool:
        """See `Store.check`."""
        try:
            await _in_thread(self._try_to_write)
        except StoreError as error:
            return self._checks.failed(error)
        return self._checks.passed()

    def _try_to_write(self) -> None:
        self._make_folders()
        # Without a name, where the system can: then not even a crash leaves it behind.
        with tempfile.TemporaryFile(dir=self._incoming, buffering=0) as file:
            file.write(bytes(4096))
            os.fsync(file.fileno())

    def _make_folders(self) -> None:
        for folder in (self._incoming, self._received, self._published, self._thumbnails):
            _make_folder(folder)


class _IncomingFile:
    """A file on its way in; see `Incoming`.

    Args:
        folder: where it is until it is kept.
        target: where it is then.
    """

    def __init__(self, folder: Path, target: Path) -> None:
        self._path = folder / uuid.uuid4().hex
        self._target = target
        self._descriptor = -1
        self._size = 0

    async def open(self) -> None:
        await _in_thread(self._open)

    def _open(self) -> None:
        # O_EXCL and O_NOFOLLOW: whatever somebody planted under this name is never written to.
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        self._descriptor = os.open(self._path, flags, 0o600)
        with suppress(OSError):  # not every file system has locks; there, nothing is swept
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)

    async def write(self, block: bytearray, digest: Callable[[bytearray], None]) -> None:
        await _in_thread(self._write, block, digest)

    def _write(self, block: bytearray, digest: Callable[[bytearray], None]) -> None:
        digest(block)
        rest = memoryview(block)
        while rest:
            rest = rest[os.write(self._descriptor, rest) :]
        if len(block) >= BLOCK:  # the last one is synced at once
            _begin_to_sync(self._descriptor, self._size, len(block))
        self._size += len(block)

    async def keep(self) -> None:
        await _in_thread(self._keep)

    def _keep(self) -> None:
        os.fsync(self._descriptor)
        # Closing the file gives up its lock, and then it might be swept.
        self._path = self._path.rename(self._target)
        self._close()
        _sync_folder(self._target.parent)

    async def discard(self) -> None:
        await _in_thread(self._discard)

    def _discard(self) -> None:
        self._close()
        self._path.unlink(missing_ok=True)

    def _close(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor != -1:
            os.close(descriptor)


def _in_thread(
    function: Callable[[*_Arguments], _Result], *args: *_Arguments
) -> asyncio.Future[_Result]:
    """Begins blocking work off the event loop."""
    return asyncio.get_running_loop().run_in_executor(None, _translated, function, *args)


def _translated(function: Callable[[*_Arguments], _Result], *args: *_Arguments) -> _Result:
    """Calls a function; what the disk refuses becomes the store's own error."""
    try:
        return function(*args)
    except OSError as error:
        raise (StoreFull if error.errno in DISK_FULL else StoreUnavailable) from error


def _read(path: Path, start: int = 0, end: int | None = None) -> bytes:
    """Some bytes of a regular file, or all of them."""
    with _regular(path).open("rb") as file:
        file.seek(start)
        return file.read(-1 if end is None else end - start)


def _untouched(folder: Path, seconds: float) -> list[Path]:
    before = time.time() - seconds
    old = []
    with suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            with suppress(FileNotFoundError):
                if entry.stat(follow_symlinks=False).st_mtime < before:
                    old.append(Path(entry.path))
    return old


def _is_being_written(path: Path) -> bool:
    """Whether a process has the lock of an incoming file; the lock ends with the process.

    The age of a file cannot tell: an upload in flight looks old after the clock was set forward.
    Raises OSError if the file system has no locks.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _regular(path: Path) -> Path:
    """Returns the path of a file; a symbolic link is none, for it may lead anywhere."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        raise NoSuchUpload from None
    if not stat.S_ISREG(mode):
        raise NoSuchUpload
    return path


def _make_folder(folder: Path) -> None:
    """Makes a folder and its parents, private and durable."""
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:
        return
    except FileNotFoundError:
        _make_folder(folder.parent)
        _make_folder(folder)
        return
    _sync_folder(folder.parent)


def _begin_to_sync(descriptor: int, start: int, size: int) -> None:
    """Has the disk begin with some bytes of a file, and waits for nothing.

    Left to itself, the system begins with a file of this size when it is told to sync it, and
    whoever has sent the last byte waits for all of them.
    """
    with suppress(OSError, AttributeError):  # no such call on macOS
        os.posix_fadvise(descriptor, start, size, os.POSIX_FADV_DONTNEED)


def _sync_folder(folder: Path) -> None:
    """Makes the names in a folder durable: fsync of a file covers its bytes, not its name.

    Some file systems cannot do that. Uploads work there all the same, and the log says once that a
    power cut may take the newest names.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _CANNOT_SYNC:
            raise
        _tell_that_names_are_not_synced(errno.errorcode[error.errno])


@cache
def _tell_that_names_are_not_synced(reason: str) -> None:
    log.warning(
        "this file system cannot sync a directory: a power cut may take the newest uploads",
        reason=reason,
        advice="let UPLOAD_URL name a directory on a local disk",
    )
