"""A store of uploads in a bucket of S3, or of anything that speaks its protocol.

received/    whole and durable, under our own id
published/   checked as well
thumbnails/  small pictures of them

An upload on its way in is in none of them: its parts are shown to nobody until it is complete.
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

from app.uploads.incoming import BLOCK, bring_in
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

# What an upload in flight holds in memory. S3 takes 10,000 parts, none but the last below 5 MiB; an
# upload that is smaller than one part is a single request.
_PART = 8 * BLOCK
_PARTS_AT_ONCE = 2

_CONNECTING = timedelta(seconds=5)
_SILENCE = timedelta(seconds=60)  # while S3 takes a part, or copies the largest upload
_REQUEST = timedelta(minutes=5)  # in all, however steadily an answer drips
# Few and soon: whoever waits is to be told, and a task is tried again by itself.
_RETRIES = 3
_RETRYING = timedelta(seconds=10)

# A signed address leads past our own headers, and a browser is to show nothing there either.
_ATTRIBUTES = {
    "Content-Disposition": "attachment",
    "Content-Type": "application/octet-stream",
}

# S3 refuses an object with more than 2 KB of system-defined metadata (S3 User Guide).
_LONGEST_DISPOSITION = 1536

_ENDPOINT = re.compile(r"https?://([A-Za-z0-9.-]+|\[[0-9a-f:]+\])(:\d+)?(/[^\s?#]*)?")
_FULL = {"QuotaExceeded", "XMinioStorageFull", "XMinioAdminBucketQuotaExceeded"}

_Answer = TypeVar("_Answer")


class S3Store:
    """A `Store` whose uploads are objects in a bucket, below a prefix, which may be empty.

    Credentials, region and endpoint are in the environment, as for every program that uses S3:
    AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION, AWS_ENDPOINT_URL. Raises CannotOpenStore
    if they make no sense.
    """

    def __init__(self, bucket: str, prefix: str) -> None:
        self._root = f"{prefix}/" if prefix else ""
        self._copying = asyncio.Lock()
        self._checks = CheckLog()
        endpoint = os.environ.get("AWS_ENDPOINT_URL")
        if endpoint is not None and not _ENDPOINT.fullmatch(endpoint):
            # obstore would panic, and not before it is used.
            raise CannotOpenStore("AWS_ENDPOINT_URL: must be https://HOST or http://HOST, or unset")
        try:
            self._bucket = Bucket(
                bucket,
                client_options={
                    "allow_http": endpoint is not None and endpoint.startswith("http:"),
                    "connect_timeout": _CONNECTING,
                    "read_timeout": _SILENCE,
                    "timeout": _REQUEST,
                },
                retry_config={"max_retries": _RETRIES, "retry_timeout": _RETRYING},
            )
        except BaseError as error:
            raise CannotOpenStore(f"UPLOAD_URL: {_reason(error)}") from None

    def _key(self, folder: str, upload_id: str) -> str:
        return f"{self._root}{folder}/{checked_id(upload_id)}"

    async def receive(
        self, upload_id: str, chunks: AsyncIterator[bytes], *, limit: int, filename: str = FALLBACK
    ) -> Received:
        """See `Store.receive`."""
        key = self._key("received", upload_id)
        return await bring_in(_IncomingObject(self._bucket, key, filename), chunks, limit=limit)

    async def head(self, upload_id: str, size: int = 8192) -> bytes:
        """See `Store.head`."""
        key, there = await self._find(upload_id)
        return await self._range(key, 0, min(size, there))

    @asynccontextmanager
    async def as_file(self, upload_id: str) -> AsyncIterator[Path]:
        """See `Store.as_file`. Here it is a copy, which is gone afterwards.

        There is one copy at a time, because the folder of temporary files may be small. Raises
        StoreFull or StoreUnavailable if that folder refuses it.
        """
        key, size = await self._find(upload_id)
        async with self._copying:
            with _copy_translated():
                file = await asyncio.to_thread(tempfile.NamedTemporaryFile)
            try:
                with _copy_translated():
                    for start in range(0, size, BLOCK):
                        block = await self._range(key, start, min(start + BLOCK, size))
                        await asyncio.to_thread(file.write, block)
                    await asyncio.to_thread(file.flush)
                yield Path(file.name)
            finally:
                await asyncio.shield(asyncio.to_thread(_close, file))

    async def _find(self, upload_id: str) -> tuple[str, int]:
        """The key and the size of an upload, received or published."""
        with suppress(NoSuchUpload):
            return await self._described(self._key("received", upload_id))
        return await self._described(self._key("published", upload_id))

    async def _described(self, key: str) -> tuple[str, int]:
        found = await _answer(self._bucket.head_async(key), missing=NoSuchUpload)
        return key, found["size"]

    async def publish(self, upload_id: str) -> None:
        """See `Store.publish`. It copies within S3, which takes at most 5 GiB at once."""
        received, published = self._key("received", upload_id), self._key("published", upload_id)
        try:
            await _answer(self._bucket.copy_async(received, published), missing=NoSuchUpload)
        except NoSuchUpload:
            # An earlier attempt may have gone as far as this.
            await self._described(published)
        await _answer(self._bucket.delete_async(received))

    async def read(self, upload_id: str, start: int, end: int) -> bytes:
        """See `Store.read`."""
        return await self._range(self._key("published", upload_id), start, end)

    async def _range(self, key: str, start: int, end: int) -> bytes:
        if start == end:  # which S3 has no words for
            await self._described(key)
            return b""
        part = self._bucket.get_range_async(key, start=start, end=end)
        return bytes(await _answer(part, missing=NoSuchUpload))

    async def signed_address(self, upload_id: str, seconds: float) -> str:
        """See `Store.signed_address`."""
        key, _ = await self._described(self._key("published", upload_id))
        return await _answer(sign_async(self._bucket, "GET", key, timedelta(seconds=seconds)))

    async def save_thumbnail(self, upload_id: str, data: bytes) -> None:
        """See `Store.save_thumbnail`."""
        key = self._key("thumbnails", upload_id)
        await _answer(self._bucket.put_async(key, data, attributes=_ATTRIBUTES))

    async def thumbnail(self, upload_id: str) -> bytes:
        """See `Store.thumbnail`."""
        key, size = await self._described(self._key("thumbnails", upload_id))
        return await self._range(key, 0, size)

    async def delete(self, upload_id: str) -> None:
        """See `Store.delete`."""
        folders = ("received", "published", "thumbnails")
        await _answer(self._bucket.delete_async([self._key(one, upload_id) for one in folders]))

    async def sweep(self, older_than: float) -> int:  # noqa: ARG002 -- S3 answers for their age
        """See `Store.sweep`. There is nothing to do: obstore cannot list the parts of uploads.

        The bucket's own lifecycle rule AbortIncompleteMultipartUpload removes what crashes left.
        """
        return 0

    async def check(self) -> bool:
        """See `Store.check`."""
        try:
            # Whoever asks may lose patience; what was stored for the proof must go all the same.
            await asyncio.shield(self._try_to_write())
        except StoreError as error:
            return self._checks.failed(error)
        return self._checks.passed()

    async def _try_to_write(self) -> None:
        key = f"{self._root}check"
        await _answer(self._bucket.put_async(key, b"", attributes=_ATTRIBUTES))
        await _answer(self._bucket.delete_async(key))


class _IncomingObject:
    """An object on its way in; see `Incoming`.

    Args:
        bucket: where it is to be.
        key: its name there.
        filename: the name under which a signed address has it saved.
    """

    def __init__(self, bucket: Bucket, key: str, filename: str) -> None:
        self._bucket = bucket
        self._key = key
        self._writer = open_writer_async(
            bucket,
            key,
            attributes=_attributes(filename),
            buffer_size=_PART,
            max_concurrency=_PARTS_AT_ONCE,
        )
        self._closing = False

    async def open(self) -> None:
        """See `Incoming.open`. S3 hears of an upload when its first part is full."""

    async def write(self, block: bytearray, digest: Callable[[bytearray], None]) -> None:
        await asyncio.to_thread(digest, block)
        await _answer(self._writer.write(block))

    async def keep(self) -> None:
        self._closing = True
        await _answer(self._writer.close())

    async def discard(self) -> None:
        if self._closing:
            # S3 may have completed it, even where its answer did not arrive.
            await _answer(self._bucket.delete_async(self._key))
        else:
            # obstore has no other name for abort than to leave the writer with an error.
            await _answer(self._writer.__aexit__(StoreError, None, None))


def _attributes(filename: str) -> dict[str, str]:
    disposition = as_attachment(filename)
    if len(disposition) > _LONGEST_DISPOSITION:  # its name is the key, if a browser saves it
        return _ATTRIBUTES
    return _ATTRIBUTES | {"Content-Disposition": disposition}


async def _answer(
    request: Awaitable[_Answer], *, missing: type[StoreError] = StoreUnavailable
) -> _Answer:
    """Awaits S3's answer; what it refuses becomes the store's own error.

    `missing` is the error for an object that is not there.
    """
    try:
        return await request
    except (BaseError, OSError) as error:
        code = _code(error)
        if isinstance(error, FileNotFoundError) and code in {"NoSuchKey", None}:
            raise missing from _Refusal(_reason(error))
        raise (StoreFull if code in _FULL else StoreUnavailable) from _Refusal(_reason(error))


class _Refusal(Exception):
    """What S3 said, in one line."""


@contextmanager
def _copy_translated() -> Iterator[None]:
    """Makes the store's own error of what this machine's disk refuses."""
    try:
        yield
    except OSError as error:
        raise (StoreFull if error.errno in DISK_FULL else StoreUnavailable) from error


def _close(file: IO[bytes]) -> None:
    """Closes and removes a temporary file; what it could not write is of no use any more."""
    with suppress(OSError):
        file.close()


def _code(error: Exception) -> str | None:
    """S3's name for an error; None for one that is not S3's."""
    found = re.search(r"<Code>(\w+)</Code>", str(error))
    return found and found[1]


def _reason(error: Exception) -> str:
    """An error in one line, without the body of S3's answer: it can repeat a session token."""
    line = str(error).partition("\n")[0]
    line = re.sub(r"(Server returned [^:]*:(?: \d+ [\w ]+)?).*", r"\1", line)
    code = _code(error)
    return f"{line} ({code})" if code else line
