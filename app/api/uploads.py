"""POST /upload and what can be done with an upload afterwards."""

from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.responses import RedirectResponse, StreamingResponse
from starlette.exceptions import HTTPException

from app.api.body import check_coding
from app.api.dependencies import ClientDep, QueueDep, SettingsDep, UploadsDep
from app.api.downloads import RESPONSES, download, only_saved
from app.api.problems import InvalidRequest, documented
from app.api.promises import DurableTasksDep
from app.api.routes import Route
from app.api.schemas import QueuedUpload, Sought, UploadPage, UploadSummary, UploadView
from app.files.multipart import (
    OVERHEAD_BYTES,
    InvalidForm,
    MalformedMultipart,
    NotMultipart,
    file_part,
)
from app.files.store import Store, UploadTooLarge
from app.files.transfer_encoding import MalformedEncoding, UnknownEncoding
from app.queue.errors import RecordNotFound
from app.queue.task import Record, new_id
from app.tasks.uploads import COLLECTION, save_upload

SIGNED_SECONDS = 300.0

router = APIRouter(tags=["uploads"], route_class=Route)

_FORM = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file"],
                    "properties": {"file": {"type": "string", "format": "binary"}},
                    "additionalProperties": False,
                }
            }
        },
    }
}

_ANY_TYPE = {"content": {"*/*": {"schema": {"type": "string", "format": "binary"}}}}


class Arrival:
    """The file of this request, kept only if the request ends well."""

    def __init__(self, store: Store, limit: int) -> None:
        self._store = store
        self._limit = limit
        self.upload_id: str | None = None

    async def receive(self, request: Request, upload_id: str) -> UploadSummary:
        """Stream the request's one file into the store; it is durable when this returns."""
        check_coding(request)
        headers = request.headers
        part, chunks = await file_part(headers.get("content-type", ""), request.stream())
        announced = int(headers.get("content-length", "0")[-20:])  # it may begin with many zeros
        if announced > self._limit + OVERHEAD_BYTES and not part.is_encoded:
            raise UploadTooLarge
        received = await self._store.receive(
            upload_id, chunks, limit=self._limit, filename=part.filename
        )
        self.upload_id = upload_id
        return UploadSummary(
            id=upload_id,
            filename=part.filename,
            content_type=part.content_type,
            size=received.size,
            sha256=received.sha256,
        )


async def _arrival(uploads: UploadsDep, settings: SettingsDep) -> AsyncIterator[Arrival]:
    arrival = Arrival(uploads, settings.max_upload_bytes)
    try:
        yield arrival
    except (NotMultipart, UnknownEncoding) as error:
        raise HTTPException(415, str(error)) from error
    except (MalformedMultipart, MalformedEncoding) as error:
        raise HTTPException(400, str(error)) from error
    except InvalidForm as error:
        raise InvalidRequest(error.pointer, error.detail) from error
    except BaseException:
        # The commit failed, or the key was used before: nobody was promised this file.
        if arrival.upload_id is not None:
            await uploads.delete(arrival.upload_id)
        raise


ArrivalDep = Annotated[Arrival, Depends(_arrival, scope="function")]


@router.post(
    "/upload",
    status_code=202,
    responses=documented(409, 413, 415, 422, 503, 507),
    openapi_extra=_FORM,
)
@router.post("/upload/", status_code=202, include_in_schema=False)
async def upload(
    request: Request, arrival: ArrivalDep, queue: QueueDep, durable_tasks: DurableTasksDep
) -> QueuedUpload:
    """Take a file of any size up to the limit. Its bytes are safe on disk before the 202."""
    summary = await arrival.receive(request, new_id(queue.now()))
    facts = summary.model_dump(exclude={"id"})
    durable_tasks.body_digest = f"{summary.filename}\n{summary.sha256}".encode()
    durable_tasks.keep(COLLECTION, summary.id, facts | {"status": "received"})
    task = durable_tasks.add_task(save_upload, upload_id=summary.id)
    return QueuedUpload.of(task, "Upload queued", upload=summary)


@router.get("/uploads", responses=documented(422, 503))
async def list_uploads(
    queue: QueueDep,
    client: ClientDep,
    limit: Annotated[int, Query(ge=1, le=100)] = 50,
    after: Annotated[Sought | None, Query(max_length=64)] = None,
) -> UploadPage:
    """Uploads, newest first; `after` is the last id of the page before."""
    records = await queue.engine.list_records(
        COLLECTION, client=client, after=after, limit=limit + 1
    )
    data = [UploadView.of(record) for record in records[:limit]]
    return UploadPage(data=data, has_more=len(records) > limit)


async def _existing(upload_id: Sought, queue: QueueDep, client: ClientDep) -> Record:
    try:
        return await queue.engine.read_record(COLLECTION, upload_id, client=client)
    except RecordNotFound:
        raise HTTPException(404, "There is no such upload.") from None


ExistingUpload = Annotated[Record, Depends(_existing)]


@router.get("/uploads/{upload_id}", responses=documented(404, 422, 503))
async def read_upload(upload: ExistingUpload) -> UploadView:
    """What is known of an upload."""
    return UploadView.of(upload)


@router.get(
    "/uploads/{upload_id}/content",
    response_class=StreamingResponse,
    responses=RESPONSES | documented(404, 409, 416, 422, 503),
    openapi_extra={"responses": {"200": _ANY_TYPE, "206": _ANY_TYPE}},
)
async def read_content(
    request: Request, upload: ExistingUpload, uploads: UploadsDep, *, signed: bool = False
) -> Response:
    """The bytes, as an attachment: a browser saves them, and runs nothing that is in them.

    `signed` asks for a redirect to where they can be fetched without this service, for five
    minutes. A store that has no such address answers with the bytes.
    """
    if upload.body["status"] != "published":
        raise HTTPException(409, "The upload is not published yet: see its task.")
    if signed and (address := await uploads.signed_address(upload.id, SIGNED_SECONDS)):
        return RedirectResponse(address)
    return await download(request, uploads, upload)


@router.get(
    "/uploads/{upload_id}/thumbnail",
    response_class=Response,
    responses={200: {"content": {"image/png": {}}}, **documented(404, 422, 503)},
)
async def read_thumbnail(upload: ExistingUpload, uploads: UploadsDep) -> Response:
    """A small picture of a picture."""
    return Response(
        await uploads.thumbnail(upload.id),
        media_type="image/png",
        headers=only_saved("thumbnail.png"),
    )


@router.delete("/uploads/{upload_id}", status_code=204, responses=documented(404, 422, 503))
async def delete_upload(upload: ExistingUpload, queue: QueueDep, uploads: UploadsDep) -> None:
    """Remove an upload: first from the list, then its bytes."""
    await queue.engine.delete_record(upload)
    await uploads.delete(upload.id)
