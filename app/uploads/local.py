"""A store of uploads in a directory of this machine.

incoming/    files that are being written; `sweep` removes those that a crash left behind
received/    complete, durable files; the name of each is the id of its upload
published/   files that a task has checked
thumbnails/  thumbnails of the pictures

A file moves from one directory to the next by a rename, which is atomic. So after a crash it is in
one of them, and it is complete unless it is in incoming/.
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

from app.uploads.incoming import BLOCK, write_stream
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
    reason_of,
)

_INCOMING_NAME = re.compile(r"[0-9a-f]{32}")
# Errors of file systems that cannot sync a directory, such as SMB, FUSE, or the shared folders of
# virtual machines.
_CANNOT_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF}

log = structlog.get_logger(__name__)

_Arguments = TypeVarTuple("_Arguments")
_Result = TypeVar("_Result")


class LocalStore:
    """A `Store` in the directory `root`. Only the user of this process can read its files."""

    def __init__(self, root: Path) -> None:
        # Absolute, so that the uploads stay in place if the working directory changes.
        root = root.absolute()
        self._incoming = root / "incoming"
        self._received = root / "received"
        self._published = root / "published"
        self._thumbnails = root / "thumbnails"
        self._logged: set[str] = set()  # names in incoming/ for which a warning was logged
        self._checks = CheckLog()

    async def receive(
        self,
        upload_id: str,
        chunks: AsyncIterator[bytes],
        *,
        limit: int,
        filename: str = FALLBACK,  # noqa: ARG002 -- only signed addresses need it
    ) -> Received:
        """See `Store.receive`."""
        return await self._write(self._received / checked_id(upload_id), chunks, limit)

    async def _write(self, target: Path, chunks: AsyncIterator[bytes], limit: int) -> Received:
        await _in_thread(self._make_folders)
        return await write_stream(_IncomingFile(self._incoming, target), chunks, limit=limit)

    async def head(self, upload_id: str, size: int = 8192) -> bytes:
        """See `Store.head`."""
        return await _in_thread(self._head, checked_id(upload_id), size)

    def _head(self, upload_id: str, size: int) -> bytes:
        return _read(self._find(upload_id), 0, size)

    @asynccontextmanager
    async def as_file(self, upload_id: str) -> AsyncIterator[Path]:
        """See `Store.as_file`. This is the stored file itself, without a copy."""
        yield await _in_thread(self._find, checked_id(upload_id))

    def _find(self, upload_id: str) -> Path:
        with suppress(NoSuchUpload):
            return _regular_file(self._received / upload_id)
        return _regular_file(self._published / upload_id)

    async def publish(self, upload_id: str) -> None:
        """See `Store.publish`."""
        await _in_thread(self._publish, checked_id(upload_id))

    def _publish(self, upload_id: str) -> None:
        self._make_folders()
        target = self._published / upload_id
        # 1. Move the file. If it is not in received/, an earlier attempt may have moved it, and may
        # have crashed before it synced the directories.
        try:
            (self._received / upload_id).rename(target)
        except FileNotFoundError:
            _regular_file(target)
        # 2. Make the move durable: first the new name, then the removal of the old one.
        _sync_folder(self._published)
        _sync_folder(self._received)

    async def read(self, upload_id: str, start: int, end: int) -> bytes:
        """See `Store.read`."""
        return await _in_thread(_read, self._published / checked_id(upload_id), start, end)

    async def signed_address(self, upload_id: str, seconds: float) -> None:  # noqa: ARG002
        """See `Store.signed_address`. Returns None: only this process can read its files."""
        checked_id(upload_id)

    async def save_thumbnail(self, upload_id: str, data: bytes) -> None:
        """See `Store.save_thumbnail`."""

        async def whole() -> AsyncIterator[bytes]:
            yield data

        await self._write(self._thumbnails / checked_id(upload_id), whole(), len(data))

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
        return sum(map(self._remove_abandoned, _unchanged_for(older_than, self._incoming)))

    def _remove_abandoned(self, path: Path) -> bool:
        """Remove a file unless a process is writing it. Return whether it was removed.

        Logs an error once for each file.
        """
        try:
            if not _INCOMING_NAME.fullmatch(path.name):
                raise OSError(errno.EINVAL, "it has no name of this service")
            if _is_being_written(path):
                return False
            path.unlink()
        except FileNotFoundError:
            return False
        except OSError as error:
            if path.name not in self._logged:
                self._logged.add(path.name)
                log.warning("cannot be swept", path=str(path), reason=reason_of(error))
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
        # On Linux this file has no name, so not even a crash leaves it behind.
        with tempfile.TemporaryFile(dir=self._incoming, buffering=0) as file:
            file.write(bytes(4096))
            os.fsync(file.fileno())

    def _make_folders(self) -> None:
        for folder in (self._incoming, self._received, self._published, self._thumbnails):
            _make_folder(folder)


class _IncomingFile:
    """An upload that is written to a file; see `Incoming`.

    For example, it is written to incoming/0f3a…, locked meanwhile, and `keep` renames it to
    received/01a1f8ed-….

    Args:
        folder: the directory for the file while it is written.
        target: the final path of the file.
    """

    def __init__(self, folder: Path, target: Path) -> None:
        self._path = folder / uuid.uuid4().hex
        self._target = target
        self._descriptor = -1
        self._size = 0

    async def open(self) -> None:
        await _in_thread(self._open)

    def _open(self) -> None:
        # O_EXCL and O_NOFOLLOW: never write to a file or a link that is there already.
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        self._descriptor = os.open(self._path, flags, 0o600)
        # The lock tells `sweep` that the file is in use. On a file system without locks, `sweep`
        # removes nothing.
        with suppress(OSError):
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)

    async def write(self, block: bytearray, digest: Callable[[bytearray], None]) -> None:
        await _in_thread(self._write, block, digest)

    def _write(self, block: bytearray, digest: Callable[[bytearray], None]) -> None:
        digest(block)
        rest = memoryview(block)
        while rest:
            rest = rest[os.write(self._descriptor, rest) :]
        if len(block) >= BLOCK:  # a shorter block is the last, and is synced next
            _start_writeback(self._descriptor, self._size, len(block))
        self._size += len(block)

    async def keep(self) -> None:
        await _in_thread(self._keep)

    def _keep(self) -> None:
        # 1. Make the bytes durable.
        os.fsync(self._descriptor)
        # 2. Give the file its final name. Close it only then, because that releases the lock, and
        # `sweep` could remove it.
        self._path = self._path.rename(self._target)
        self._close()
        # 3. Make the name durable.
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
    """Start a blocking function in a thread. The future raises OSError as a StoreError."""
    return asyncio.get_running_loop().run_in_executor(None, _with_store_errors, function, *args)


def _with_store_errors(function: Callable[[*_Arguments], _Result], *args: *_Arguments) -> _Result:
    """Call a function, and turn OSError into StoreFull or StoreUnavailable."""
    try:
        return function(*args)
    except OSError as error:
        raise (StoreFull if error.errno in DISK_FULL else StoreUnavailable) from error


def _read(path: Path, start: int = 0, end: int | None = None) -> bytes:
    """Return the bytes of a regular file from `start` up to `end`, or to its end."""
    with _regular_file(path).open("rb") as file:
        file.seek(start)
        return file.read(-1 if end is None else end - start)


def _unchanged_for(seconds: float, folder: Path) -> list[Path]:
    """List the files in a folder that have not changed for so many seconds."""
    before = time.time() - seconds
    old = []
    with suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            with suppress(FileNotFoundError):
                if entry.stat(follow_symlinks=False).st_mtime < before:
                    old.append(Path(entry.path))
    return old


def _is_being_written(path: Path) -> bool:
    """Return whether a process holds the lock of a file. The kernel releases it at a crash.

    The age of a file is not enough: if the clock is set forward, an upload in flight looks old.
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


def _regular_file(path: Path) -> Path:
    """Return the path if it is a regular file. A symbolic link is not: it may lead anywhere.

    Raises NoSuchUpload.
    """
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        raise NoSuchUpload from None
    if not stat.S_ISREG(mode):
        raise NoSuchUpload
    return path


def _make_folder(folder: Path) -> None:
    """Make a folder and its missing parents, durably, and for this user only."""
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:
        return
    except FileNotFoundError:
        _make_folder(folder.parent)
        _make_folder(folder)
        return
    _sync_folder(folder.parent)


def _start_writeback(descriptor: int, start: int, size: int) -> None:
    """Make the kernel start writing some bytes of a file to the disk. Does not wait.

    Otherwise the kernel begins to write a file of this size only at the fsync, and the client waits
    for the whole file at the end of its upload.
    """
    with suppress(OSError, AttributeError):  # no such call on macOS
        os.posix_fadvise(descriptor, start, size, os.POSIX_FADV_DONTNEED)


def _sync_folder(folder: Path) -> None:
    """Make the names in a folder durable. The fsync of a file covers its bytes, not its name.

    Some file systems cannot sync a folder. Uploads still work there, and a warning is logged once.
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
        _warn_that_names_are_not_synced(errno.errorcode[error.errno])


@cache
def _warn_that_names_are_not_synced(reason: str) -> None:
    log.warning(
        "this file system cannot sync a directory: a power cut may take the newest uploads",
        reason=reason,
        advice="let UPLOAD_URL name a directory on a local disk",
    )
