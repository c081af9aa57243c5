"""Downloads: the bytes of an upload, or a range of them (RFC 9110, sections 13 and 14)."""

import re
from collections.abc import AsyncIterator
from typing import Any

from fastapi import Request, Response
from fastapi.responses import StreamingResponse
from starlette.exceptions import HTTPException

from afterward.task import Record
from app.uploads.names import as_attachment
from app.uploads.store import Store

BLOCK = 1024 * 1024  # bytes that one download holds in memory

BYTES = {
    "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
}
RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {"description": "The whole file", **BYTES},
    206: {"description": "The requested range", **BYTES},
    304: {"description": "The client has the current version already"},
    307: {"description": "A signed URL of the store, for `signed=true`"},
}

# A page of this service could load a download of these types as a script or a style sheet, because
# its Content-Security-Policy allows all that comes from the same server. So they are sent as plain
# text. The scripts are all JavaScript MIME types (WHATWG MIME Sniffing, section 4.6).
_LOADED_BY_PAGES = re.compile(
    r"(?:text|application)/(?:x-)?(?:java|ecma|live|j)script[0-9.]*(?=;|$)|text/css(?=;|$)",
    re.IGNORECASE,
)

_RANGE = re.compile(r"bytes=(?:([0-9]{1,20})-([0-9]{0,20})|-([0-9]{1,20}))", re.IGNORECASE)
_TAG = re.compile(r'"[^"]*"')  # of a weak tag, W/"…", too: If-None-Match treats them alike


async def download(request: Request, uploads: Store, upload: Record) -> Response:
    """Return the response to a GET of a published upload.

    The first block is read before the response begins, so that NoSuchUpload and StoreUnavailable
    still become errors. Raises HTTPException 416 if the range begins after the end.
    """
    size, etag = upload.body["size"], f'"{upload.body["sha256"]}"'
    if has_current(request, etag):
        return Response(status_code=304, headers={"ETag": etag})
    headers = only_saved(upload.body["filename"], upload.body["content_type"])
    headers |= {"ETag": etag, "Accept-Ranges": "bytes"}
    start, end, status = 0, size, 200
    if requested := _range(request, etag, size):
        (start, end), status = requested, 206
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
    headers["Content-Length"] = str(end - start)
    first = await uploads.read(upload.id, start, min(start + BLOCK, end))

    async def blocks() -> AsyncIterator[bytes]:
        yield first
        for offset in range(start + BLOCK, end, BLOCK):
            yield await uploads.read(upload.id, offset, min(offset + BLOCK, end))

    return StreamingResponse(blocks(), status, headers=headers)


def only_saved(filename: str, media_type: str) -> dict[str, str]:
    """Return headers that make a browser save the file, and run no script in it.

    Pass them as headers only, without the `media_type` of a response: Starlette would add
    charset=utf-8 to text, which may be wrong.
    """
    return {
        "Content-Type": _LOADED_BY_PAGES.sub("text/plain", media_type),
        "Content-Disposition": as_attachment(filename),
        "Content-Security-Policy": "sandbox",
        "X-Content-Type-Options": "nosniff",
    }


def has_current(request: Request, etag: str) -> bool:
    """Whether the client has the current version already (RFC 9110, section 13.1.2)."""
    tags = ",".join(request.headers.getlist("if-none-match"))
    return tags.strip() == "*" or etag in _TAG.findall(tags)


def _range(request: Request, etag: str, size: int) -> tuple[int, int] | None:
    """Return the requested range as (start, end), where `end` is excluded. None means all bytes.

    Several ranges and a malformed one are ignored (RFC 9110, section 14.2). So is a range of
    another version, which If-Range names (section 13.1.5). For example, of 1,000 bytes
    "bytes=200-299" is (200, 300), and "bytes=-100" is (900, 1000).
    """
    match = _RANGE.fullmatch(request.headers.get("range", ""))
    if not match or request.headers.get("if-range", etag) != etag:
        return None
    first, last, suffix = match.groups()
    start = int(first) if first else max(0, size - int(suffix))
    if last and int(last) < start:
        return None
    if start >= size:
        raise HTTPException(
            416,
            "The range begins after the end of the file.",
            headers={"Content-Range": f"bytes */{size}"},
        )
    return start, min(int(last) + 1, size) if last else size
