"""POST /upload, and the routes under /uploads: list, read, download and delete."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, aclosing, suppress
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.responses import RedirectResponse, StreamingResponse
from starlette.exceptions import HTTPException

from afterward.engine import Engine
from afterward.errors import QueueError, RecordNotFound
from afterward.fastapi import DurableTasks, RequestUnitOfWork
from afterward.queue import Queue
from afterward.task import Record, Task, new_id
from afterward.unit_of_work import UnitOfWork
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
from app.api.route import ServiceRoute, reads_stream, without_turn
from app.api.schemas import QueuedUpload, SearchText, UploadPage, UploadSummary, UploadView
from app.tasks.pending_uploads import PendingUploads
from app.tasks.tools import Tools
from app.tasks.uploads import COLLECTION, remove_upload, save_upload
from app.uploads.multipart import (
    OVERHEAD_BYTES,
    InvalidForm,
    MalformedMultipart,
    NotMultipart,
    file_part,
)
from app.uploads.store import NoSuchUpload, Store, StoreError, UploadTooLarge
from app.uploads.transfer_encoding import MalformedEncoding, UnknownEncoding

SIGNED_SECONDS = 300.0
GIVEN_UP = (
    "The service gave up this upload, because its heartbeat had stopped for too long. Try again."
)

# Errors of an invalid form; _answer_to has their status.
_FORM_ERRORS = (NotMultipart, UnknownEncoding, MalformedMultipart, MalformedEncoding, InvalidForm)

router = APIRouter(tags=["uploads"], route_class=ServiceRoute)

_FILE_FORM = {
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
    """The file of a request while it arrives.

    Before the file is stored, a record in the database announces it. A crash then leaves a record,
    by which the clean-up finds the file and removes it.
    """

    def __init__(self, store: Store, pending_uploads: PendingUploads, limit: int) -> None:
        self._store = store
        self._pending_uploads = pending_uploads
        self._limit = limit
        self._flight = AsyncExitStack()
        self.pending: Record | None = None
        """The record that announces the upload, once it is on disk. The commit removes it."""

    async def receive(self, request: Request, upload_id: str) -> UploadSummary:
        """Stream the file of the request into the store. It is on disk when this returns."""
        check_coding(request)
        headers = request.headers
        part, chunks = await file_part(headers.get("content-type", ""), request.stream())
        # The length may begin with many zeros, and Python refuses to parse very long numbers.
        announced = int(headers.get("content-length", "0")[-20:])
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
        """Remove the file, and then the record that announces it.

        Call this only if the commit has certainly failed. The database is asked once more whether
        it has the upload. If the database or the store fails, the record stays, and the clean-up
        removes the file later.
        """
        if self.pending is None:
            return
        with suppress(QueueError, StoreError):
            if not await _is_committed(engine, self.pending.id):
                await self._store.delete(self.pending.id)
                await engine.delete_record(self.pending)

    async def aclose(self) -> None:
        """Stop the heartbeat. From then on, the clean-up may remove an upload without a commit."""
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
    """Make the arrival of an upload. Its file is removed again unless the upload is committed.

    Nothing is committed after an error, nor for a repeated request, which gets the first response
    again. If the outcome of the commit is unknown, the file stays, and the clean-up decides later
    by the record in the database.
    """
    async with aclosing(Arrival(uploads, pending_uploads, settings.max_upload_bytes)) as arrival:
        try:
            yield arrival
        except _FORM_ERRORS as error:
            raise _answer_to(error) from error
        except RecordNotFound as error:
            raise HTTPException(503, GIVEN_UP) from error
        finally:
            if not durable_tasks.may_be_written:
                await arrival.undo(queue.engine)


def _answer_to(error: Exception) -> Exception:
    match error:
        case InvalidForm():
            return InvalidRequest(error.pointer, error.detail)
        case MalformedMultipart() | MalformedEncoding():
            return HTTPException(400, str(error))
        case _:
            return HTTPException(415, str(error))


# With function scope, the dependency ends after DurableRoute has committed, so `may_be_written` is
# known, and before the response is sent. With the default scope it would end after the response,
# and a client that reads slowly would delay the removal of a file.
ArrivalDep = Annotated[Arrival, Depends(_arrival, scope="function")]


# Not `file: UploadFile`: FastAPI would write the whole form, however large, to a temporary file
# before the route starts. docs/how-it-works.md has all the reasons.
@router.post(
    "/upload",
    status_code=202,
    responses=documented(409, 413, 415, 422, 503, 507),
    openapi_extra=_FILE_FORM,
)
@router.post("/upload/", status_code=202, include_in_schema=False)
@reads_stream
async def upload(
    request: Request, arrival: ArrivalDep, queue: QueueDep, durable_tasks: DurableTasks
) -> QueuedUpload:
    """Store a file, and queue the task that publishes it. The bytes are on disk before the 202."""
    summary, task = await store_upload(request, arrival, queue, durable_tasks)
    return QueuedUpload.of(task, "Upload queued", upload=summary)


async def store_upload(
    request: Request, arrival: Arrival, queue: Queue[Tools], durable_tasks: RequestUnitOfWork
) -> tuple[UploadSummary, Task]:
    """Store the file of a request, and add the record and the task of the upload to its commit."""
    summary = await arrival.receive(request, new_id(queue.now()))
    assert arrival.pending is not None
    facts = summary.model_dump(exclude={"id"})
    durable_tasks.body_digest = f"{summary.filename}\n{summary.sha256}".encode()
    durable_tasks.remove_record(arrival.pending)
    durable_tasks.add_record(COLLECTION, summary.id, facts | {"status": "received"})
    return summary, durable_tasks.add_task(save_upload, upload_id=summary.id)


@router.get("/uploads", responses=documented(422, 503))
async def list_uploads(
    queue: QueueDep,
    client: ClientDep,
    limit: Annotated[int, Query(ge=1, le=100)] = 50,
    after: Annotated[SearchText | None, Query(max_length=64)] = None,
) -> UploadPage:
    """List uploads, newest first. `after` is the last id of the previous page."""
    records = await queue.engine.list_records(
        COLLECTION, client=client, after=after, limit=limit + 1
    )
    data = [UploadView.of(record) for record in records[:limit]]
    return UploadPage(data=data, has_more=len(records) > limit)


async def _existing_upload(upload_id: SearchText, queue: QueueDep, client: ClientDep) -> Record:
    try:
        return await queue.engine.read_record(COLLECTION, upload_id, client=client)
    except RecordNotFound:
        raise HTTPException(404, "There is no such upload.") from None


ExistingUpload = Annotated[Record, Depends(_existing_upload)]


@router.get("/uploads/{upload_id}", responses=documented(404, 422, 503))
async def read_upload(upload: ExistingUpload) -> UploadView:
    """Read the metadata of an upload."""
    return UploadView.of(upload)


@router.get(
    "/uploads/{upload_id}/content",
    response_class=StreamingResponse,
    responses=RESPONSES | documented(404, 409, 416, 422, 503),
    openapi_extra={"responses": {"200": _ANY_TYPE, "206": _ANY_TYPE}},
)
@without_turn  # because it waits for the store
async def read_content(
    request: Request, upload: ExistingUpload, uploads: UploadsDep, *, signed: bool = False
) -> Response:
    """Download the bytes as an attachment: a browser saves them, and runs no script in them.

    `signed` asks for a redirect to a signed URL of the store, which works for five minutes without
    this service. A store without signed URLs sends the bytes.
    """
    view = UploadView.of(upload)
    if view.status != "published":
        raise HTTPException(409, "The upload is not published yet. See the status of its task.")
    if None in view.model_dump().values():
        raise HTTPException(409, "The metadata of this upload is damaged. See its null fields.")
    if signed and (address := await uploads.signed_address(upload.id, SIGNED_SECONDS)):
        return RedirectResponse(address)
    return await download(request, uploads, upload)


@router.get(
    "/uploads/{upload_id}/thumbnail",
    response_class=Response,
    responses={200: {"content": {"image/png": {}}}, **documented(404, 422, 503)},
)
@without_turn  # because it waits for the store
async def read_thumbnail(upload: ExistingUpload, uploads: UploadsDep) -> Response:
    """Return a thumbnail, if the upload is a picture."""
    try:
        thumbnail = await uploads.thumbnail(upload.id)
    except NoSuchUpload:
        raise HTTPException(404, "This upload has no thumbnail, or not yet.") from None
    return Response(thumbnail, headers=only_saved("thumbnail.png", "image/png"))


@router.delete(
    "/uploads/{upload_id}",
    status_code=204,
    response_class=Response,  # a JSONResponse would have a Content-Type, without any content
    responses=documented(404, 422, 503, 507),
)
async def delete_upload(upload: ExistingUpload, durable_tasks: DurableTasks) -> None:
    """Remove an upload from the list, and queue the removal of its bytes, in one transaction."""
    add_removal(upload, durable_tasks)


def add_removal(upload: Record, durable_tasks: UnitOfWork[Any]) -> None:
    """Add the removal of an upload to a unit of work: of its record, and of its bytes."""
    durable_tasks.remove_record(upload)
    durable_tasks.add_task(remove_upload, upload_id=upload.id)
