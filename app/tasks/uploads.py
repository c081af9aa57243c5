"""The durable tasks of an uploaded file: check and publish it, make its thumbnail, remove it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import structlog

from afterward.errors import (
    PermanentError,
    QueueUnavailable,
    RecordNotFound,
    TemporaryError,
)
from afterward.retry import RetryPolicy
from afterward.task import Record
from app.settings import Settings
from app.tasks.tools import Context
from app.uploads.names import media_type
from app.uploads.pictures import MEDIA_TYPES, PictureRefused
from app.uploads.store import NoSuchUpload, StoreFull, StoreUnavailable

COLLECTION = "uploads"
# Larger pictures, in bytes, get no thumbnail. A picture in S3 is copied to the container's /tmp,
# which has 64 MiB in docker-compose.yml.
LARGEST_PICTURE = 48 << 20
# As long as for a mail (RFC 5321, 4.5.4.1): a store may be down for a weekend, and no upload fails.
STORE_RETRY_SECONDS = 4 * 24 * 3600.0

log = structlog.get_logger(__name__)


async def save_upload(context: Context, *, upload_id: str) -> dict[str, str] | None:
    """Determine the type of an uploaded file, publish the file, and queue a picture's thumbnail.

    Returns the upload's id and type, or None if the client has deleted the upload meanwhile.
    Raises PermanentError if the file is missing, TemporaryError if the store or the database
    refuses.
    """
    with _refusals_are_temporary():
        record = await _find_record(context, upload_id)
        if record is None:
            await _remove_leftovers(context, upload_id)
            return None
        declared = record.body.get("content_type", "application/octet-stream")
        try:
            actual = media_type(await context.tools.uploads.head(upload_id), declared)
            await context.tools.uploads.publish(upload_id)
        except NoSuchUpload as missing:
            await _fail_unless_deleted(context, upload_id, missing)
            return None
        if actual != declared:
            log.warning("upload is not what it says", upload_id=upload_id, actual=actual)
        # Read the record again. If this attempt was so slow that another one has done its work, the
        # record may say by now that there is a thumbnail. A few milliseconds remain in which that
        # can be overwritten; then the pages do not show the thumbnail.
        record = await _find_record(context, upload_id)
        if record is None or not await _update(context, record, actual):
            await _remove_leftovers(context, upload_id)
            return None
        if actual in MEDIA_TYPES:
            context.durable_tasks.add_task(make_thumbnail, upload_id=upload_id)
        log.info("upload published", upload_id=upload_id, content_type=actual)
        return {"upload_id": upload_id, "content_type": actual}


async def _update(context: Context, record: Record, content_type: str) -> bool:
    body = record.body | {"content_type": content_type, "status": "published"}
    return await context.tools.engine.update_record(replace(record, body=body))


async def make_thumbnail(context: Context, *, upload_id: str) -> None:
    """Make a picture's thumbnail, in a child process because decoding would block the event loop.

    Afterwards, the upload's record says that there is one.

    Raises PermanentError if the file is missing or cannot be decoded, TemporaryError if the store
    or the database refuses.
    """
    with _refusals_are_temporary():
        record = await _find_record(context, upload_id)
        if record is None:
            await _remove_leftovers(context, upload_id)
            return
        try:
            thumbnail = await _make_small(context, record)
        except NoSuchUpload as missing:
            await _fail_unless_deleted(context, upload_id, missing)
            return
        except PictureRefused as error:
            log.warning("no thumbnail can be made", upload_id=upload_id, reason=str(error))
            raise PermanentError(str(error)) from error
        await context.tools.uploads.save_thumbnail(upload_id, thumbnail)
        body = record.body | {"thumbnail": True}
        # The client may have deleted the upload while the thumbnail was made and stored.
        if not await context.tools.engine.update_record(replace(record, body=body)):
            await _remove_leftovers(context, upload_id)


async def _make_small(context: Context, record: Record) -> bytes:
    if record.body.get("size", 0) > LARGEST_PICTURE:
        raise PictureRefused(f"The picture is larger than {LARGEST_PICTURE >> 20} MiB.")
    async with context.tools.uploads.as_file(record.id) as picture:
        return await context.tools.pictures.thumbnail(picture)


async def remove_upload(context: Context, *, upload_id: str) -> None:
    """Remove the bytes and the thumbnail of an upload. Its record must be gone.

    Raises PermanentError if there is a record, because then a client was promised the upload.
    """
    with _refusals_are_temporary():
        if await _find_record(context, upload_id, of_any_client=True) is not None:
            raise PermanentError(f"upload {upload_id} has a record, so its file stays")
        await context.tools.uploads.delete(upload_id)
        log.info("upload removed", upload_id=upload_id)


def retry_policy(settings: Settings) -> RetryPolicy:
    """Return the policy for uploads: four days for an outage, a few attempts for a bug."""
    return RetryPolicy(
        settings.retry_attempts,
        settings.retry_base_seconds,
        settings.retry_max_seconds,
        give_up_after=STORE_RETRY_SECONDS,
    )


@contextmanager
def _refusals_are_temporary() -> Iterator[None]:
    """Turn a refusal of the store or of the database into TemporaryError.

    Not into ServiceUnavailable, which would pause the tasks of every upload: the store may refuse a
    single file, for example because of a bad sector.
    """
    try:
        yield
    except (StoreFull, StoreUnavailable, QueueUnavailable) as error:
        raise TemporaryError(str(error)) from error


async def _find_record(
    context: Context, upload_id: str, *, of_any_client: bool = False
) -> Record | None:
    """Return the upload's record, or None if it is gone."""
    client = None if of_any_client else context.task.client
    try:
        return await context.tools.engine.read_record(COLLECTION, upload_id, client=client)
    except RecordNotFound:
        return None


async def _fail_unless_deleted(context: Context, upload_id: str, missing: NoSuchUpload) -> None:
    """Raise PermanentError, unless the client deletes the upload at the same time."""
    if await _find_record(context, upload_id) is not None:
        raise PermanentError(f"the file of upload {upload_id} is gone") from missing
    await _remove_leftovers(context, upload_id)


async def _remove_leftovers(context: Context, upload_id: str) -> None:
    """Remove the files of a deleted upload: this task may have stored some after the deletion."""
    await context.tools.uploads.delete(upload_id)
    log.info("upload was deleted meanwhile", upload_id=upload_id)
