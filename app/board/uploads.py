"""/board/uploads: the uploads with their thumbnails, and the forms that add and delete one.

board.js sends files to POST /upload, and shows their progress. Without the script, the form of the
page sends one file to POST /board/uploads, which ends on this page.
"""

from contextlib import suppress
from typing import Annotated

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import HTMLResponse

from afterward.errors import RecordNotFound
from afterward.fastapi import DurableTasks
from app.api.dependencies import ClientDep, QueueDep, SettingsDep, UploadsDep
from app.api.forms import see_other
from app.api.page_texts import query_with
from app.api.pages import page
from app.api.route import ServiceRoute
from app.api.routes.uploads import (
    FILE_FORM,
    ArrivalDep,
    ExistingUpload,
    add_removal,
    store_upload,
)
from app.api.schemas import SearchText, UploadView
from app.tasks.uploads import COLLECTION
from app.uploads.pictures import MEDIA_TYPES
from app.uploads.store import NoSuchUpload

LISTED = 25
# In place of a thumbnail that is not made yet, or cannot be made.
_NO_THUMBNAIL = b'<svg xmlns="http://www.w3.org/2000/svg" width="1" height="1"/>'

router = APIRouter(include_in_schema=False, route_class=ServiceRoute)


@router.get("/board/uploads")
async def list_uploads(
    request: Request,
    queue: QueueDep,
    client: ClientDep,
    settings: SettingsDep,
    after: Annotated[SearchText | None, Query(max_length=64)] = None,
) -> HTMLResponse:
    """List uploads, newest first."""
    records = await queue.engine.list_records(
        COLLECTION, client=client, after=after, limit=LISTED + 1
    )
    uploads = [UploadView.of(record) for record in records[:LISTED]]
    return page(
        request,
        "board/uploads.html",
        uploads=uploads,
        pictures={upload.id for upload in uploads if upload.content_type in MEDIA_TYPES},
        older=query_with(request, after=uploads[-1].id) if len(records) > LISTED else None,
        newest=query_with(request, after=None) if after else None,
        most_bytes=settings.max_upload_bytes,
    )


@router.post("/board/uploads", openapi_extra=FILE_FORM)
async def upload(
    request: Request, arrival: ArrivalDep, queue: QueueDep, durable_tasks: DurableTasks
) -> Response:
    """Store the file of the form, as POST /upload does."""
    await store_upload(request, arrival, queue, durable_tasks)
    return see_other("/board/uploads")


@router.post("/board/uploads/{upload_id}/delete")
async def delete_upload(
    request: Request, upload_id: SearchText, queue: QueueDep, client: ClientDep
) -> Response:
    """Delete an upload, as DELETE /uploads/{id} does. After a double click, it is gone already."""
    with suppress(RecordNotFound):
        upload = await queue.engine.read_record(COLLECTION, upload_id, client=client)
        async with queue.transaction(request.state.request_id, client) as transaction:
            add_removal(upload, transaction)
    return see_other("/board/uploads")


@router.get("/board/uploads/{upload_id}/thumbnail")
async def read_thumbnail(upload: ExistingUpload, uploads: UploadsDep) -> Response:
    """Return the thumbnail of a picture, or an empty image in its place."""
    headers = {"X-Content-Type-Options": "nosniff", "Content-Security-Policy": "sandbox"}
    try:
        thumbnail = await uploads.thumbnail(upload.id)
    except NoSuchUpload:
        headers["Cache-Control"] = "no-store"
        return Response(_NO_THUMBNAIL, media_type="image/svg+xml", headers=headers)
    headers["Cache-Control"] = "private, max-age=86400"
    return Response(thumbnail, media_type="image/png", headers=headers)
