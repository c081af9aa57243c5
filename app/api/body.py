"""Strict JSON: what RFC 8259 allows, and nothing that would surprise a later reader."""

import json
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic_core import from_json
from starlette.exceptions import HTTPException


class StrictRequest(Request):
    """A request whose JSON is parsed strictly.

    Python's own parser takes NaN, infinities and half surrogate pairs, none of which can be
    written back as JSON; and recurses as deep as the client likes.
    """

    async def json(self) -> Any:
        """The body's value; HTTPException 400 if it is not JSON."""
        try:
            value = from_json(await self.body(), allow_inf_nan=False)
            json.dumps(value, allow_nan=False)  # 1e999 is JSON, but becomes an infinity
        except ValueError as error:
            raise HTTPException(400, f"The body is not valid JSON: {_reason(error)}") from None
        return value


class StrictRoute(APIRoute):
    """A route that takes JSON only as JSON: labelled so, and strictly parsed."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Wrap FastAPI's handler."""
        handler = super().get_route_handler()
        takes_json = self.body_field is not None

        async def strict(request: Request) -> Response:
            request = StrictRequest(request.scope, request.receive)
            if takes_json and not _says_json(request) and await request.body():
                raise HTTPException(415, "Send JSON, with Content-Type: application/json.")
            return await handler(request)

        return strict


def _says_json(request: Request) -> bool:
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    return media_type == "application/json" or (
        media_type.startswith("application/") and media_type.endswith("+json")
    )


def _reason(error: ValueError) -> str:
    """The parser's reason; it names a place, never the text there."""
    return str(error)[:100]
