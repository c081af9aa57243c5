"""The bytes of an upload: all of them, or the range a client asks for (RFC 9110, 13 and 14)."""

import re
from collections.abc import AsyncIterator
from typing import Any

from fastapi import Request, Response
from fastapi.responses import StreamingResponse
from starlette.exceptions import HTTPException

from afterward.task import Record
from app.uploads.names import as_attachment
from app.uploads.store import Store

BLOCK = 1024 * 1024  # what one download holds in memory

BYTES = {
    "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
}
RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {"description": "All of it", **BYTES},
    206: {"description": "The range that was asked for", **BYTES},
    304: {"description": "The client has it already"},
    307: {"description": "Where it can be fetched without this service"},
}

_RANGE = re.compile(r"bytes=(?:([0-9]{1,20})-([0-9]{0,20})|-([0-9]{1,20}))", re.IGNORECASE)
_TAG = re.compile(r'"[^"]*"')  # weak ones too: for this they are alike


async def download(request: Request, uploads: Store, upload: Record) -> Response:
    """Answers a GET for a published upload's bytes.

    Its first bytes are there before the answer begins, so that a store can still say NoSuchUpload
    or StoreUnavailable. Raises HTTPException 416 for a range that begins after the end.
    """
    size, etag = upload.body["size"], f'"{upload.body["sha256"]}"'
    if _is_known(request, etag):
        return Response(status_code=304, headers={"ETag": etag})
    headers = only_saved(upload.body["filename"]) | {"ETag": etag, "Accept-Ranges": "bytes"}
    # Starlette adds charset=utf-8 to a media_type of text; the sender of the file knows better.
    headers["Content-Type"] = upload.body["content_type"]
    start, end, status = 0, size, 200
    if wanted := _range(request, etag, size):
        (start, end), status = wanted, 206
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
    headers["Content-Length"] = str(end - start)
    first = await uploads.read(upload.id, start, min(start + BLOCK, end))

    async def blocks() -> AsyncIterator[bytes]:
        yield first
        for offset in range(start + BLOCK, end, BLOCK):
            yield await uploads.read(upload.id, offset, min(offset + BLOCK, end))

    return StreamingResponse(blocks(), status, headers=headers)


def only_saved(filename: str) -> dict[str, str]:
    """Returns the headers that make a browser save a file, and run nothing that is in it."""
    return {
        "Content-Disposition": as_attachment(filename),
        "Content-Security-Policy": "sandbox",
        "X-Content-Type-Options": "nosniff",
    }


def _is_known(request: Request, etag: str) -> bool:
    """Whether the client has these bytes already (RFC 9110, section 13.1.2)."""
    tags = ",".join(request.headers.getlist("if-none-match"))
    return tags.strip() == "*" or etag in _TAG.findall(tags)


def _range(request: Request, etag: str, size: int) -> tuple[int, int] | None:
    """The first byte that is wanted and the first one after; None if that is all of them.

    More than one range, or one that is malformed, counts as none (RFC 9110, section 14.2); so does
    one of other bytes than ours (section 13.1.5).
    """
    wanted = _RANGE.fullmatch(request.headers.get("range", ""))
    if not wanted or request.headers.get("if-range", etag) != etag:
        return None
    first, last, suffix = wanted.groups()
    start = int(first) if first else max(0, size - int(suffix))
    if last and int(last) < start:
        return None
    if start >= size:
        raise HTTPException(
            416, "The range begins after the end.", headers={"Content-Range": f"bytes */{size}"}
        )
    return start, min(int(last) + 1, size) if last else size
