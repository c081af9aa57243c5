"""/board/uploads: the uploads with their thumbnails, and the forms that add and delete one.

board.js sends files to POST /upload, and shows their progress. Without the script, the form of the
page sends one file to POST /board/uploads, which ends on this page.
"""

from contextlib import suppress
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import HTMLResponse

from afterward.errors import RecordNotFound
from afterward.fastapi import DurableTasks
from afterward.task import Record
from app.api.dependencies import ClientDep, QueueDep, SettingsDep, UploadsDep
from app.api.forms import see_other
from app.api.page_texts import query_with
from app.api.pages import page
from app.api.route import ServiceRoute, reads_stream, without_turn
from app.api.routes.uploads import (
    ArrivalDep,
    ExistingUpload,
    add_removal,
    store_upload,
)
from app.api.schemas import SearchText, UploadView
from app.tasks.uploads import COLLECTION

LISTED = 25

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
    return _uploads_page(
        request,
        records[:LISTED],
        older=query_with(request, after=records[LISTED - 1].id) if len(records) > LISTED else None,
        newest=query_with(request, after=None) if after else None,
        most_bytes=settings.max_upload_bytes,
    )


@router.get("/board/uploads/{upload_id}")
async def read_upload(request: Request, upload: ExistingUpload) -> HTMLResponse:
    """Show one upload as the list does, however old it is."""
    return _uploads_page(request, [upload], is_one=True)


def _uploads_page(request: Request, records: list[Record], **more: Any) -> HTMLResponse:
    return page(
        request,
        "board/uploads.html",
        uploads=[UploadView.of(record) for record in records],
        thumbnails={record.id for record in records if _has_thumbnail(record)},
        **(dict[str, Any](is_one=False, older=None, newest=None) | more),
    )


def _has_thumbnail(record: Record) -> bool:
    """Whether the thumbnail is made already. An `<img>` without one would stay empty."""
    return isinstance(record.body, dict) and record.body.get("thumbnail") is True


@router.post("/board/uploads")
@reads_stream
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
@without_turn  # because it waits for the store
async def read_thumbnail(upload: ExistingUpload, uploads: UploadsDep) -> Response:
    """Return the thumbnail of a picture. The browser may keep it for a day."""
    headers = {
        "X-Content-Type-Options": "nosniff",
        "Content-Security-Policy": "sandbox",
        "Cache-Control": "private, max-age=86400",
    }
    thumbnail = await uploads.thumbnail(upload.id)
    return Response(thumbnail, media_type="image/png", headers=headers)
