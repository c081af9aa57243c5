"""POST /upload and what can be done with an upload afterwards."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, suppress
from typing import Annotated

from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.responses import RedirectResponse, StreamingResponse
from starlette.exceptions import HTTPException

from afterward.engine import Engine
from afterward.errors import QueueError, RecordNotFound
from afterward.fastapi import DurableTasks
from afterward.task import Record, new_id
from app.api.dependencies import (
    ClientDep,
    PendingUploadsDep,
    QueueDep,
    SettingsDep,
    UploadsDep,
)
from app.api.downloads import RESPONSES, download, only_saved
from app.api.errors import InvalidRequest, documented
from app.api.json_body import check_coding
from app.api.route import ServiceRoute
from app.api.schemas import QueuedUpload, Sought, UploadPage, UploadSummary, UploadView
from app.tasks.pending_uploads import PendingUploads
from app.tasks.uploads import COLLECTION, remove_upload, save_upload
from app.uploads.multipart import (
    OVERHEAD_BYTES,
    InvalidForm,
    MalformedMultipart,
    NotMultipart,
    file_part,
)
from app.uploads.store import Store, StoreError, UploadTooLarge
from app.uploads.transfer_encoding import MalformedEncoding, UnknownEncoding

SIGNED_SECONDS = 300.0
GIVEN_UP = (
    "The service gave up this upload, because its process was silent for too long. Try again."
)

# The errors of a form that cannot be taken; see _answer_to.
_REFUSALS = (NotMultipart, UnknownEncoding, MalformedMultipart, MalformedEncoding, InvalidForm)

router = APIRouter(tags=["uploads"], route_class=ServiceRoute)

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
    """The file of this request, in the store and in the database."""

    def __init__(self, store: Store, pending_uploads: PendingUploads, limit: int) -> None:
        self._store = store
        self._pending_uploads = pending_uploads
        self._limit = limit
        self._flight = AsyncExitStack()
        self.pending: Record | None = None
        """The upload's record until it is committed, once that record is on disk."""

    async def receive(self, request: Request, upload_id: str) -> UploadSummary:
        """Stream the request's one file into the store; it is durable when this returns."""
        check_coding(request)
        headers = request.headers
        part, chunks = await file_part(headers.get("content-type", ""), request.stream())
        announced = int(headers.get("content-length", "0")[-20:])  # it may begin with many zeros
        if announced > self._limit + OVERHEAD_BYTES and not part.is_encoded:
            raise UploadTooLarge
        begun = self._pending_uploads.begin(upload_id)
        self.pending = await self._flight.enter_async_context(begun)
        received = await self._store.receive(
            upload_id, chunks, limit=self._limit, filename=part.filename
        )
        return UploadSummary(
            id=upload_id,
            filename=part.filename,
            content_type=part.content_type,
            size=received.size,
            sha256=received.sha256,
        )

    async def undo(self, engine: Engine) -> None:
        """Remove the file, and then the record that says that there may be one.

        To be called if the commit has certainly failed; and the database is asked once more. If it
        refuses, or the store does, the record is left, and the clean-up removes the file later.
        """
        if self.pending is None:
            return
        with suppress(QueueError, StoreError):
            if not await _is_committed(engine, self.pending.id):
                await self._store.delete(self.pending.id)
                await engine.delete_record(self.pending)

    async def end(self) -> None:
        """Let the clean-up decide what becomes of an upload that was not committed."""
        await self._flight.aclose()


async def _is_committed(engine: Engine, upload_id: str) -> bool:
    try:
        await engine.read_record(COLLECTION, upload_id, client=None)
    except RecordNotFound:
        return False
    return True


async def _arrival(
    uploads: UploadsDep,
    pending_uploads: PendingUploadsDep,
    settings: SettingsDep,
    queue: QueueDep,
    durable_tasks: DurableTasks,
) -> AsyncIterator[Arrival]:
    arrival = Arrival(uploads, pending_uploads, settings.max_upload_bytes)
    try:
        yield arrival
    except _REFUSALS as error:
        await arrival.undo(queue.engine)
        raise _answer_to(error) from error
    except RecordNotFound as error:
        await arrival.undo(queue.engine)
        raise HTTPException(503, GIVEN_UP) from error
    except BaseException:
        # The file of an upload that may be committed stays: only the database knows.
        if not durable_tasks.may_be_written:
            await arrival.undo(queue.engine)
        raise
    finally:
        await arrival.end()


def _answer_to(error: Exception) -> Exception:
    match error:
        case InvalidForm():
            return InvalidRequest(error.pointer, error.detail)
        case MalformedMultipart() | MalformedEncoding():
            return HTTPException(400, str(error))
        case _:
            return HTTPException(415, str(error))


ArrivalDep = Annotated[Arrival, Depends(_arrival, scope="function")]


@router.post(
    "/upload",
    status_code=202,
    responses=documented(409, 413, 415, 422, 503, 507),
    openapi_extra=_FORM,
)
@router.post("/upload/", status_code=202, include_in_schema=False)
async def upload(
    request: Request, arrival: ArrivalDep, queue: QueueDep, durable_tasks: DurableTasks
) -> QueuedUpload:
    """Take a file of any size up to the limit. Its bytes are safe on disk before the 202."""
    summary = await arrival.receive(request, new_id(queue.now()))
    assert arrival.pending is not None
    facts = summary.model_dump(exclude={"id"})
    durable_tasks.body_digest = f"{summary.filename}\n{summary.sha256}".encode()
    durable_tasks.remove_record(arrival.pending)
    durable_tasks.add_record(COLLECTION, summary.id, facts | {"status": "received"})
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
    view = UploadView.of(upload)
    if view.status != "published":
        raise HTTPException(409, "The upload is not published yet: see its task.")
    if None in view.model_dump().values():
        raise HTTPException(409, "The record of this upload is damaged: see its null fields.")
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


@router.delete("/uploads/{upload_id}", status_code=204, responses=documented(404, 422, 503, 507))
async def delete_upload(upload: ExistingUpload, durable_tasks: DurableTasks) -> None:
    """Remove an upload from the list, and queue the removal of its bytes, in one transaction."""
    durable_tasks.remove_record(upload)
    durable_tasks.add_task(remove_upload, upload_id=upload.id)
