"""The promises about an uploaded file: check and publish it, and make a picture's thumbnail."""

from dataclasses import replace

import structlog

from app.files.names import media_type
from app.files.pictures import MEDIA_TYPES, PictureRefused
from app.files.store import NoSuchUpload
from app.queue.errors import PermanentError, RecordNotFound
from app.tasks.tools import Context

COLLECTION = "uploads"

log = structlog.get_logger(__name__)


async def save_upload(context: Context, *, upload_id: str) -> dict[str, str] | None:
    """Find out what the file really is, and publish it; a picture gets a thumbnail afterwards."""
    tools = context.tools
    try:
        record = await tools.engine.read_record(COLLECTION, upload_id, client=context.task.client)
        head = await tools.uploads.head(upload_id)
    except (RecordNotFound, NoSuchUpload):
        log.info("upload was deleted meanwhile", upload_id=upload_id)
        return None
    declared = record.body["content_type"]
    actual = media_type(head, declared)
    if actual != declared:
        log.warning("upload is not what it says", upload_id=upload_id, actual=actual)
    await tools.uploads.publish(upload_id)
    body = record.body | {"content_type": actual, "status": "published"}
    if not await tools.engine.update_record(replace(record, body=body)):
        await tools.uploads.delete(upload_id)
        return None
    if actual in MEDIA_TYPES:
        context.durable_tasks.add_task(make_thumbnail, upload_id=upload_id)
    log.info("upload published", upload_id=upload_id, content_type=actual)
    return {"upload_id": upload_id, "content_type": actual}


async def make_thumbnail(context: Context, *, upload_id: str) -> None:
    """Make a picture's thumbnail in another process: decoding would hold up the event loop."""
    tools = context.tools
    try:
        async with tools.uploads.as_file(upload_id) as picture:
            thumbnail = await tools.pictures.thumbnail(picture)
        await tools.uploads.save_thumbnail(upload_id, thumbnail)
    except NoSuchUpload:
        log.info("upload was deleted meanwhile", upload_id=upload_id)
    except PictureRefused as error:
        log.warning("no thumbnail can be made", upload_id=upload_id, reason=str(error))
        raise PermanentError(str(error)) from error
