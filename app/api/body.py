"""Strict JSON in, which is what RFC 8259 allows; JSON that ends with a newline out."""

import json
import re
from typing import Any

from fastapi import Request, Response
from pydantic_core import from_json
from starlette.exceptions import HTTPException
from starlette.types import Message, Receive

# An exponent, or more digits than a number of 64 bits has; or a text that looks like it.
_MAY_OVERFLOW = re.compile(rb"\d[eE]|\d{309}")

TOO_LARGE = "The body is larger than this service takes."


class StrictRequest(Request):
    """A request whose JSON is parsed strictly.

    Python's own parser takes NaN, infinities and half surrogate pairs, none of which can be
    written back as JSON; and recurses as deep as the client likes.
    """

    async def json(self) -> Any:
        """The body's value; HTTPException 400 if it is not JSON."""
        try:
            body = await self.body()
            value = from_json(body, allow_inf_nan=False)
            if _MAY_OVERFLOW.search(body):  # 1e999 is JSON, but becomes an infinity
                json.dumps(value, allow_nan=False)
        except ValueError as error:
            # The parser's reason names a place, never the text there.
            reason = str(error)[:100]
            raise HTTPException(400, f"The body is not valid JSON: {reason}") from None
        return value


def within(limit: int, receive: Receive) -> Receive:
    """Receive a body of at most so many bytes; HTTPException 413 at the first one more."""
    received = 0

    async def receive_within_limit() -> Message:
        nonlocal received
        message = await receive()
        received += len(message.get("body", b""))
        if received > limit:
            raise HTTPException(413, TOO_LARGE)
        return message

    return receive_within_limit


def end_with_newline(response: Response) -> Response:
    """End an answer of JSON as a text file ends, so that a shell's prompt begins a line of its own.

    FastAPI writes the body with pydantic. A response class of ours could add the newline as well,
    but then FastAPI would take a slower way.
    """
    if response.media_type == "application/json" and response.body:
        response.body = bytes(response.body) + b"\n"
        response.headers["Content-Length"] = str(len(response.body))
    return response


def says_json(request: Request) -> bool:
    """Whether the request's Content-Type is a kind of JSON."""
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    return media_type == "application/json" or (
        media_type.startswith("application/") and media_type.endswith("+json")
    )
