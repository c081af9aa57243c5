"""JSON bodies: requests are parsed strictly by RFC 8259, and responses end with a newline."""

import json
import re
from codecs import BOM_UTF8, BOM_UTF16_BE, BOM_UTF16_LE
from typing import Any

from fastapi import Request, Response
from pydantic_core import from_json
from starlette.exceptions import HTTPException

# A number that may be infinite as a float: it has an exponent, or 309 digits or more. The pattern
# may match inside a string, too; then the slower check below finds no infinity.
_MAY_OVERFLOW = re.compile(rb"\d[eE]|\d{309}")

_CHARSET = re.compile(r';\s*charset\s*=\s*"?([^\s;"]*)')
_UTF_8 = {"utf-8", "utf8", "us-ascii", "ascii"}

_BYTE_ORDER_MARKS = (BOM_UTF8, BOM_UTF16_BE, BOM_UTF16_LE)  # UTF-32 begins like the last one

BYTE_ORDER_MARK = "send UTF-8 without a byte order mark (RFC 8259, section 8.1)"


class StrictRequest(Request):
    """A request with strict parsing of JSON.

    Python's own parser accepts NaN, infinities and half surrogate pairs, which cannot be written
    back as JSON. It also recurses as deep as the client's data is nested.
    """

    async def json(self) -> Any:
        """Return the value of the body. Raises HTTPException 400 if the body is not JSON."""
        body = await self.body()
        try:
            value = from_json(body, allow_inf_nan=False)
            if _MAY_OVERFLOW.search(body):  # 1e999 is JSON, but becomes an infinity
                json.dumps(value, allow_nan=False)
        except ValueError as error:
            # The parser names the line and column of the error, never the text there.
            reason = BYTE_ORDER_MARK if body.startswith(_BYTE_ORDER_MARKS) else str(error)[:100]
            raise HTTPException(400, f"The body is not valid JSON: {reason}") from None
        return value


def end_with_newline(response: Response) -> Response:
    """Add a newline to a JSON response, so that a shell's prompt begins on a new line after curl.

    A response class of our own could do this too. But then FastAPI would not let pydantic write the
    body, which is faster.
    """
    if response.media_type == "application/json" and response.body:
        response.body = bytes(response.body) + b"\n"
        response.headers["Content-Length"] = str(len(response.body))
    return response


def check_json(request: Request) -> None:
    """Raise HTTPException 415 if the headers say that the body is not JSON in UTF-8."""
    check_coding(request)
    content_type: str = request.headers.get("content-type", "").lower()
    media_type = content_type.partition(";")[0].strip()
    if media_type != "application/json" and not (
        media_type.startswith("application/") and media_type.endswith("+json")
    ):
        raise HTTPException(415, "Send JSON, with Content-Type: application/json.")
    if (charset := _CHARSET.search(content_type)) and charset[1] not in _UTF_8:
        raise HTTPException(415, "Send JSON in UTF-8, its only charset (RFC 8259, 8.1).")


def check_coding(request: Request) -> None:
    """Raise HTTPException if the headers say that the body is encoded or incomplete.

    A compressed body is refused with 415 (RFC 9110, section 15.5.16), a part of a larger body with
    400 (section 14.5).
    """
    for name, value in request.scope["headers"]:
        if name == b"content-encoding" and value.strip().lower() not in {b"", b"identity"}:
            raise HTTPException(
                415,
                "The body has a Content-Encoding. Send it uncompressed.",
                {"Accept-Encoding": "identity"},
            )
        if name == b"content-range":
            raise HTTPException(400, "The body is only a part (Content-Range). Send all of it.")
