"""Strict JSON in, which is what RFC 8259 allows; JSON that ends with a newline out."""

import json
import re
from codecs import BOM_UTF8, BOM_UTF16_BE, BOM_UTF16_LE
from typing import Any

from fastapi import Request, Response
from pydantic_core import from_json
from starlette.exceptions import HTTPException

# An exponent, or more digits than a number of 64 bits has; or a text that looks like it.
_MAY_OVERFLOW = re.compile(rb"\d[eE]|\d{309}")

_CHARSET = re.compile(r';\s*charset\s*=\s*"?([^\s;"]*)')
_UTF_8 = {"utf-8", "utf8", "us-ascii", "ascii"}

_MARKS = (BOM_UTF8, BOM_UTF16_BE, BOM_UTF16_LE)  # the last one also begins UTF-32

BYTE_ORDER_MARK = "send UTF-8 without a byte order mark (RFC 8259, section 8.1)"


class StrictRequest(Request):
    """A request whose JSON is parsed strictly.

    Python's own parser takes NaN, infinities and half surrogate pairs, none of which can be
    written back as JSON; and recurses as deep as the client likes.
    """

    async def json(self) -> Any:
        """Returns the body's value. Raises HTTPException 400 if it is not JSON."""
        body = await self.body()
        try:
            value = from_json(body, allow_inf_nan=False)
            if _MAY_OVERFLOW.search(body):  # 1e999 is JSON, but becomes an infinity
                json.dumps(value, allow_nan=False)
        except ValueError as error:
            # The parser's reason names a place, never the text there.
            reason = BYTE_ORDER_MARK if body.startswith(_MARKS) else str(error)[:100]
            raise HTTPException(400, f"The body is not valid JSON: {reason}") from None
        return value


def end_with_newline(response: Response) -> Response:
    """End an answer of JSON as a text file ends, so that a shell's prompt begins a line of its own.

    FastAPI writes the body with pydantic. A response class of ours could add the newline as well,
    but then FastAPI would take a slower way.
    """
    if response.media_type == "application/json" and response.body:
        response.body = bytes(response.body) + b"\n"
        response.headers["Content-Length"] = str(len(response.body))
    return response


def check_json(request: Request) -> None:
    """Raises HTTPException 415 if the body is not JSON in UTF-8, as the request's headers say."""
    check_coding(request)
    content_type: str = request.headers.get("content-type", "").lower()
    media_type = content_type.partition(";")[0].strip()
    if media_type != "application/json" and not (
        media_type.startswith("application/") and media_type.endswith("+json")
    ):
        raise HTTPException(415, "Send JSON, with Content-Type: application/json.")
    if (charset := _CHARSET.search(content_type)) and charset[1] not in _UTF_8:
        raise HTTPException(415, "Send JSON in UTF-8, which is its only charset (RFC 8259, 8.1).")


def check_coding(request: Request) -> None:
    """Raises HTTPException if the bytes of the body are not the content, but stand for it.

    A compressed body is refused with 415 (RFC 9110, section 15.5.16), a part of a larger one with
    400 (section 14.5).
    """
    for name, value in request.scope["headers"]:
        if name == b"content-encoding" and value.strip().lower() not in {b"", b"identity"}:
            raise HTTPException(
                415,
                "The body is compressed or otherwise encoded (Content-Encoding). Send it as it is.",
                {"Accept-Encoding": "identity"},
            )
        if name == b"content-range":
            raise HTTPException(400, "The body is a part (Content-Range). Send it as a whole.")
