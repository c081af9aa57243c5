"""A store of uploads in a bucket of S3, or of a server that speaks its protocol.

received/    complete, durable objects; the name of each is the id of its upload
published/   objects that a task has checked
thumbnails/  thumbnails of the pictures

There is no incoming/, because S3 shows an object only once all its parts have arrived. S3 has no
rename either, so `publish` copies an object and then deletes the original.
"""

import asyncio
import os
import re
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import IO, TypeVar

from obstore import open_writer_async, sign_async
from obstore.exceptions import BaseError
from obstore.store import S3Store as Bucket

from app.uploads.incoming import BLOCK, write_stream
from app.uploads.names import FALLBACK, as_attachment
from app.uploads.store import (
    DISK_FULL,
    CannotOpenStore,
    CheckLog,
    NoSuchUpload,
    Received,
    StoreError,
    StoreFull,
    StoreUnavailable,
    checked_id,
)

# Bytes in one part of an upload, and parts that are sent at once. Each upload in flight holds them
# in memory. S3 accepts up to 10,000 parts, of at least 5 MiB each but for the last. An upload that
# is smaller than one part is sent as a single request.
_PART = 8 * BLOCK
_PARTS_AT_ONCE = 2

_CONNECT_TIMEOUT = timedelta(seconds=5)
_READ_TIMEOUT = timedelta(seconds=60)  # for S3 to store a part, or to copy the largest upload
_REQUEST_TIMEOUT = timedelta(minutes=5)  # for a whole request, even if data arrives steadily
# obstore retries only briefly, because a client waits for the result, and the queue retries tasks.
_RETRIES = 3
_RETRY_TIMEOUT = timedelta(seconds=10)

# The headers of every object. A browser that follows a signed address gets them from S3, not from
# this service, and must not display the file there either.
_ATTRIBUTES = {
    "Content-Disposition": "attachment",
    "Content-Type": "application/octet-stream",
}

# S3 refuses an object with more than 2 KB of system-defined metadata (S3 User Guide).
_LONGEST_DISPOSITION = 1536  # bytes of Content-Disposition

_ENDPOINT = re.compile(r"https?://([A-Za-z0-9.-]+|\[[0-9a-f:]+\])(:\d+)?(/[^\s?#]*)?")
_FULL_CODES = {"QuotaExceeded", "XMinioStorageFull", "XMinioAdminBucketQuotaExceeded"}

_Result = TypeVar("_Result")


class S3Store:
    """A `Store` in a bucket, below a prefix, which may be empty.

    Credentials, region and endpoint come from the environment, as for other programs that use S3:
    AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION, AWS_ENDPOINT_URL. Raises CannotOpenStore
    if they are not valid.
    """

    def __init__(self, bucket: str, prefix: str) -> None:
        self._root = f"{prefix}/" if prefix else ""
        self._copying = asyncio.Lock()
        self._checks = CheckLog()
        endpoint = os.environ.get("AWS_ENDPOINT_URL")
        if endpoint is not None and not _ENDPOINT.fullmatch(endpoint):
            # obstore would accept it here, and panic at the first use.
            raise CannotOpenStore("AWS_ENDPOINT_URL: must be https://HOST or http://HOST, or unset")
        try:
            self._bucket = Bucket(
                bucket,
                client_options={
                    "allow_http": endpoint is not None and endpoint.startswith("http:"),
                    "connect_timeout": _CONNECT_TIMEOUT,
                    "read_timeout": _READ_TIMEOUT,
                    "timeout": _REQUEST_TIMEOUT,
                },
                retry_config={"max_retries": _RETRIES, "retry_timeout": _RETRY_TIMEOUT},
            )
        except BaseError as error:
            raise CannotOpenStore(f"UPLOAD_URL: {_one_line(error)}") from None

    def _key(self, folder: str, upload_id: str) -> str:
        return f"{self._root}{folder}/{checked_id(upload_id)}"

    async def receive(
        self, upload_id: str, chunks: AsyncIterator[bytes], *, limit: int, filename: str = FALLBACK
    ) -> Received:
        """See `Store.receive`."""
        key = self._key("received", upload_id)
        return await write_stream(_IncomingObject(self._bucket, key, filename), chunks, limit=limit)

    async def head(self, upload_id: str, size: int = 8192) -> bytes:
        """See `Store.head`."""
        key, there = await self._find(upload_id)
        return await self._read_range(key, 0, min(size, there))

    @asynccontextmanager
    async def as_file(self, upload_id: str) -> AsyncIterator[Path]:
        """See `Store.as_file`. Downloads a copy, and removes it after the block.

        Makes one copy at a time, because the directory for temporary files may be small. Raises
        StoreFull or StoreUnavailable if it cannot be written there.
        """
        key, size = await self._find(upload_id)
        async with self._copying:
            with _store_errors_for_copy():
                file = await asyncio.to_thread(tempfile.NamedTemporaryFile)
            try:
                with _store_errors_for_copy():
                    for start in range(0, size, BLOCK):
                        block = await self._read_range(key, start, min(start + BLOCK, size))
                        await asyncio.to_thread(file.write, block)
                    await asyncio.to_thread(file.flush)
                yield Path(file.name)
            finally:
                await asyncio.shield(asyncio.to_thread(_close_temporary, file))

    async def _find(self, upload_id: str) -> tuple[str, int]:
        """Return the key and the size of a received or published upload."""
        with suppress(NoSuchUpload):
            return await self._key_and_size(self._key("received", upload_id))
        return await self._key_and_size(self._key("published", upload_id))

    async def _key_and_size(self, key: str) -> tuple[str, int]:
        found = await _with_store_errors(self._bucket.head_async(key), missing=NoSuchUpload)
        return key, found["size"]

    async def publish(self, upload_id: str) -> None:
        """See `Store.publish`. S3 copies at most 5 GiB in one request.

        A crash between the two steps leaves both objects. The task runs again and repeats the copy.
        A crash after step 2 leaves only the published object, and the second run finds it.
        """
        received, published = self._key("received", upload_id), self._key("published", upload_id)
        # 1. Copy the object. If there is none, an earlier attempt must have published it.
        try:
            await _with_store_errors(
                self._bucket.copy_async(received, published), missing=NoSuchUpload
            )
        except NoSuchUpload:
            await self._key_and_size(published)
        # 2. Delete the original.
        await _with_store_errors(self._bucket.delete_async(received))

    async def read(self, upload_id: str, start: int, end: int) -> bytes:
        """See `Store.read`."""
        return await self._read_range(self._key("published", upload_id), start, end)

    async def _read_range(self, key: str, start: int, end: int) -> bytes:
        if start == end:  # HTTP has no empty range (RFC 9110, section 14.1.2)
            await self._key_and_size(key)
            return b""
        part = self._bucket.get_range_async(key, start=start, end=end)
        return bytes(await _with_store_errors(part, missing=NoSuchUpload))

    async def signed_address(self, upload_id: str, seconds: float) -> str:
        """See `Store.signed_address`."""
        key, _ = await self._key_and_size(self._key("published", upload_id))
        return await _with_store_errors(
            sign_async(self._bucket, "GET", key, timedelta(seconds=seconds))
        )

    async def save_thumbnail(self, upload_id: str, data: bytes) -> None:
        """See `Store.save_thumbnail`."""
        key = self._key("thumbnails", upload_id)
        await _with_store_errors(self._bucket.put_async(key, data, attributes=_ATTRIBUTES))

    async def thumbnail(self, upload_id: str) -> bytes:
        """See `Store.thumbnail`."""
        key, size = await self._key_and_size(self._key("thumbnails", upload_id))
        return await self._read_range(key, 0, size)

    async def delete(self, upload_id: str) -> None:
        """See `Store.delete`."""
        folders = ("received", "published", "thumbnails")
        await _with_store_errors(
            self._bucket.delete_async([self._key(folder, upload_id) for folder in folders])
        )

    async def sweep(self, older_than: float) -> int:  # noqa: ARG002 -- the bucket's rule has an age
        """See `Store.sweep`. Does nothing, because obstore cannot list the parts of uploads.

        The bucket's lifecycle rule AbortIncompleteMultipartUpload removes the parts that a crash
        left behind.
        """
        return 0

    async def check(self) -> bool:
        """See `Store.check`."""
        try:
            # The shield lets the object of the check be deleted even if the caller is cancelled.
            await asyncio.shield(self._try_to_write())
        except StoreError as error:
            return self._checks.failed(error)
        return self._checks.passed()

    async def _try_to_write(self) -> None:
        key = f"{self._root}check"
        await _with_store_errors(self._bucket.put_async(key, b"", attributes=_ATTRIBUTES))
        await _with_store_errors(self._bucket.delete_async(key))


class _IncomingObject:
    """An upload that is written to an object; see `Incoming`.

    Args:
        bucket: the bucket of the object.
        key: the key of the object.
        filename: the name under which a browser saves it from a signed address.
    """

    def __init__(self, bucket: Bucket, key: str, filename: str) -> None:
        self._bucket = bucket
        self._key = key
        self._writer = open_writer_async(
            bucket,
            key,
            attributes=_headers_of_object(filename),
            buffer_size=_PART,
            max_concurrency=_PARTS_AT_ONCE,
        )
        self._closing = False

    async def open(self) -> None:
        """See `Incoming.open`. The first request is sent when the first part is full."""

    async def write(self, block: bytearray, digest: Callable[[bytearray], None]) -> None:
        await asyncio.to_thread(digest, block)
        await _with_store_errors(self._writer.write(block))

    async def keep(self) -> None:
        self._closing = True
        await _with_store_errors(self._writer.close())

    async def discard(self) -> None:
        if self._closing:
            # S3 may have completed the object, even if its response was lost.
            await _with_store_errors(self._bucket.delete_async(self._key))
        else:
            # obstore aborts an upload only if its context manager is left with an error.
            await _with_store_errors(self._writer.__aexit__(StoreError, None, None))


def _headers_of_object(filename: str) -> dict[str, str]:
    """Return the headers of an object, with the file name if it is short enough."""
    disposition = as_attachment(filename)
    if len(disposition) > _LONGEST_DISPOSITION:  # a browser then saves it under its key
        return _ATTRIBUTES
    return _ATTRIBUTES | {"Content-Disposition": disposition}


async def _with_store_errors(
    request: Awaitable[_Result], *, missing: type[StoreError] = StoreUnavailable
) -> _Result:
    """Return the result of a request, and turn an error of S3 into a StoreError.

    `missing` is the error to raise if the object does not exist.
    """
    try:
        return await request
    except (BaseError, OSError) as error:
        code = _error_code(error)
        if isinstance(error, FileNotFoundError) and code in {"NoSuchKey", None}:
            raise missing from _Refusal(_one_line(error))
        raise (StoreFull if code in _FULL_CODES else StoreUnavailable) from _Refusal(
            _one_line(error)
        )


class _Refusal(Exception):
    """An error of S3 in one line."""


@contextmanager
def _store_errors_for_copy() -> Iterator[None]:
    """Turn an OSError of this machine's disk into StoreFull or StoreUnavailable."""
    try:
        yield
    except OSError as error:
        raise (StoreFull if error.errno in DISK_FULL else StoreUnavailable) from error


def _close_temporary(file: IO[bytes]) -> None:
    """Close and remove a temporary file. Ignore errors, because nothing needs its bytes now."""
    with suppress(OSError):
        file.close()


def _error_code(error: Exception) -> str | None:
    """Return the error code in S3's response, such as "NoSuchKey", or None without one."""
    found = re.search(r"<Code>(\w+)</Code>", str(error))
    return found and found[1]


def _one_line(error: Exception) -> str:
    """Return an error in one line, without the body of the response, which may have a token."""
    line = str(error).partition("\n")[0]
    line = re.sub(r"(Server returned [^:]*:(?: \d+ [\w ]+)?).*", r"\1", line)
    code = _error_code(error)
    return f"{line} ({code})" if code else line
