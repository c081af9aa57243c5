"""The routes under /inbox: the mails that the embedded catcher has received, as JSON.

Browsers get pages at the same paths: see app.board.inbox. All clients share one inbox, because it
is a tool for development.
"""

import asyncio
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Annotated, Any, TypeVar

import structlog
from fastapi import APIRouter, Depends, Path, Query, Response
from fastapi.responses import StreamingResponse
from starlette.exceptions import HTTPException

from app.api.dependencies import CatcherDep
from app.api.downloads import only_saved
from app.api.errors import documented
from app.api.mail_schemas import MailDetail, MailPage, MailQuery, MailSummary, name_of
from app.api.negotiation import VARY_BY_ACCEPT, DataRoute
from app.api.route import ServiceRoute, without_turn
from app.api.schemas import SearchText
from app.mail.catcher import Catcher
from app.mail.caught import Caught

NO_MAIL = "There is no such mail. The inbox keeps the newest 1,000."
NO_FILE = "The file of this mail has been removed, or cannot be read."
NOT_DELETED = "The mail could not be deleted. The log has the reason."

ResultT = TypeVar("ResultT")

log = structlog.get_logger(__name__)


async def _running_catcher(catcher: CatcherDep) -> Catcher:
    if catcher is None:
        raise HTTPException(404, "The embedded mail catcher is off. CATCHER=true turns it on.")
    return catcher


RunningCatcher = Annotated[Catcher, Depends(_running_catcher)]


async def _existing_mail(mail_id: SearchText, catcher: RunningCatcher) -> Caught:
    mail = await asyncio.to_thread(catcher.get, mail_id)
    if mail is None:
        raise HTTPException(404, NO_MAIL)
    return mail


ExistingMail = Annotated[Caught, Depends(_existing_mail)]

# The JSON of what pages show, too
data_router = APIRouter(tags=["inbox"], route_class=DataRoute, dependencies=[VARY_BY_ACCEPT])


@data_router.get("/inbox", responses=documented(404, 422))
@data_router.get("/inbox/", include_in_schema=False)
@without_turn
async def list_mails(query: Annotated[MailQuery, Query()], catcher: RunningCatcher) -> MailPage:
    """List the mails that the embedded catcher has received, newest first.

    The inbox is for development: all clients see the same mails. A browser, which prefers
    `text/html`, gets a page instead. The same holds for a single mail.
    """
    mails = await asyncio.to_thread(
        catcher.list, query.q.split(), after=query.after, limit=query.limit + 1
    )
    return MailPage(
        data=[MailSummary.of(mail) for mail in mails[: query.limit]],
        has_more=len(mails) > query.limit,
    )


@data_router.get("/inbox/{mail_id}", responses=documented(404, 422))
@without_turn
async def read_mail(mail: ExistingMail) -> MailDetail:
    """Read one mail: its texts, its header fields, and what is attached to it."""
    return MailDetail.of(mail)


router = APIRouter(tags=["inbox"], route_class=ServiceRoute)


def _file(media_type: str) -> dict[str, Any]:
    return {"content": {media_type: {"schema": {"type": "string", "format": "binary"}}}}


@router.get(
    "/inbox/{mail_id}/source",
    response_class=StreamingResponse,
    responses={200: _file("message/rfc822"), **documented(404, 422)},
)
@without_turn
async def read_source(mail: ExistingMail, catcher: RunningCatcher) -> StreamingResponse:
    """Download the mail as the client sent it, byte for byte."""
    return await _download(
        catcher.read_source(mail.id), mail.size, f"{mail.id}.eml", "message/rfc822"
    )


@router.get(
    "/inbox/{mail_id}/attachments/{number}",
    response_class=StreamingResponse,
    responses={200: _file("*/*"), **documented(404, 422)},
)
@without_turn
async def read_attachment(
    mail: ExistingMail,
    number: Annotated[int, Path(ge=0, description="Its place in `attachments`, from 0.")],
    catcher: RunningCatcher,
) -> StreamingResponse:
    """Download an attachment: a browser saves it, and never shows it."""
    if number >= len(mail.attached):
        raise HTTPException(404, "This mail has no such attachment.")
    attachment = mail.attached[number]
    return await _download(
        catcher.read_attachment(mail.id, attachment),
        attachment.size,
        name_of(attachment, number),
        attachment.content_type,
    )


async def _download(
    blocks: Iterator[bytes], size: int, filename: str, media_type: str
) -> StreamingResponse:
    """Send the bytes of a file. It is opened before the response begins, which can still be 404."""
    try:
        first = await asyncio.to_thread(next, blocks, b"")
    except OSError:  # removed since it was found, or not readable
        raise HTTPException(404, NO_FILE) from None
    headers = only_saved(filename, media_type) | {"Content-Length": str(size)}
    return StreamingResponse(chain((first,), blocks), headers=headers)


@router.delete(
    "/inbox/{mail_id}",
    status_code=204,
    response_class=Response,
    responses=documented(404, 422, 503),
)
@without_turn
async def delete_mail(mail_id: SearchText, catcher: RunningCatcher) -> None:
    """Remove one mail."""
    if not await delete_with(catcher.delete, mail_id):
        raise HTTPException(404, NO_MAIL)


@router.delete("/inbox", status_code=204, response_class=Response, responses=documented(404, 503))
@without_turn
async def delete_mails(catcher: RunningCatcher) -> None:
    """Remove all mails."""
    await delete_with(catcher.delete_all)


async def delete_with(delete: Callable[..., ResultT], *args: str) -> ResultT:
    """Call a function that removes files, in a thread. Raises HTTPException 503 if it fails."""
    try:
        return await asyncio.to_thread(delete, *args)
    except OSError as error:
        log.error("mail not deleted", error=str(error))  # noqa: TRY400 -- the cause is outside
        raise HTTPException(503, NOT_DELETED) from error


router.routes.extend(data_router.routes)
