"""Every error as problem+json (RFC 9457): clear, small, and never an echo of the input."""

import json
import re
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any
from urllib.parse import quote

import structlog
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.routing import Match

from afterward.errors import (
    BacklogFull,
    BatchNotFound,
    CommitUnknown,
    QueueFull,
    QueueUnavailable,
    RecordNotFound,
    TaskHasStarted,
    TaskNotFound,
    TaskNotGivenUp,
)
from afterward.fastapi import IdempotencyKeyReused
from app.api.schemas import Problem as ProblemSchema
from app.uploads.store import (
    NoSuchUpload,
    StoreFull,
    StoreUnavailable,
    UploadTooLarge,
    reason_of,
)

MOST_ERRORS = 10  # of one request; with the bounds below, a problem stays under 4 KB
LONGEST_DETAIL = 120
DEEPEST_POINTER = 3
_NAME = re.compile(r"[A-Za-z0-9_-]{1,40}")

# What the floors below raise, as a status; their docstrings are the details.
_STATUS: dict[type[Exception], HTTPStatus] = {
    TaskNotFound: HTTPStatus.NOT_FOUND,
    RecordNotFound: HTTPStatus.NOT_FOUND,
    BatchNotFound: HTTPStatus.NOT_FOUND,
    NoSuchUpload: HTTPStatus.NOT_FOUND,
    TaskHasStarted: HTTPStatus.CONFLICT,
    TaskNotGivenUp: HTTPStatus.CONFLICT,
    UploadTooLarge: HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    BacklogFull: HTTPStatus.SERVICE_UNAVAILABLE,
    CommitUnknown: HTTPStatus.SERVICE_UNAVAILABLE,
    QueueUnavailable: HTTPStatus.SERVICE_UNAVAILABLE,
    StoreUnavailable: HTTPStatus.SERVICE_UNAVAILABLE,
    QueueFull: HTTPStatus.INSUFFICIENT_STORAGE,
    StoreFull: HTTPStatus.INSUFFICIENT_STORAGE,
}
_TITLES = {413: "Content Too Large", 422: "Unprocessable Content"}  # RFC 9110; Python 3.13 on
# A malformed request, no API key, none that is right, too many requests, our own mistakes.
_ANYWHERE = (400, 401, 403, 429, 500)
_RETRY_LATER = {HTTPStatus.SERVICE_UNAVAILABLE, HTTPStatus.INSUFFICIENT_STORAGE}
_SCHEMAS = "#/components/schemas/"
_RETRY_AFTER = {"Retry-After": {"required": True, "schema": {"type": "integer", "minimum": 1}}}
_HEADERS = {
    401: {"WWW-Authenticate": {"required": True, "schema": {"type": "string"}}},
    **dict.fromkeys((429, 503, 507), _RETRY_AFTER),
}

log = structlog.get_logger(__name__)


class InvalidRequest(Exception):
    """A 422 that names the fields, as validation's own does."""

    def __init__(self, pointer: str, detail: str) -> None:
        super().__init__(detail)
        self.errors = [{"pointer": pointer, "detail": detail}]


def install(app: FastAPI) -> None:
    """Answer every error of `app` with a problem."""
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(InvalidRequest, _invalid)
    app.add_exception_handler(IdempotencyKeyReused, _invalid)
    for error in _STATUS:
        app.add_exception_handler(error, _known)
    _describe(app)


def _describe(app: FastAPI) -> None:
    """Put what a problem is into the document of `app`, once for all the errors that name it."""
    describe = app.openapi
    schema = ProblemSchema.model_json_schema(ref_template=_SCHEMAS + "{model}")
    schemas = schema.pop("$defs") | {"Problem": schema}

    def openapi() -> dict[str, Any]:
        document = describe()
        document["components"]["schemas"] |= schemas
        return document

    app.openapi = openapi  # type: ignore[method-assign]


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """These errors, and those that any request may meet, for a route's `responses`."""
    content = {"application/problem+json": {"schema": {"$ref": _SCHEMAS + "Problem"}}}
    return {
        status: {
            "description": HTTPStatus(status).phrase,
            "headers": _HEADERS.get(status, {}),
            "content": content,
        }
        for status in sorted({*statuses, *_ANYWHERE})
    }


def problem(
    path: str,
    status: int,
    detail: str,
    *,
    errors: Sequence[Mapping[str, str]] | None = None,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """One error as a response. `path` is the request's, for `instance`."""
    body = {
        "type": "about:blank",
        "title": _TITLES.get(status) or HTTPStatus(status).phrase,
        "status": status,
        "detail": detail,
        "instance": quote(path, errors="replace")[:200],
    }
    if errors is not None:
        body["errors"] = errors
    if status in _RETRY_LATER:
        headers = {"Retry-After": "2", **(headers or {})}
    return Response(
        json.dumps(body) + "\n", status, media_type="application/problem+json", headers=headers
    )


async def _http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    detail, headers = error.detail, error.headers
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        # Starlette names the methods of the first route that matches, and there may be more.
        headers = {"Allow": _allowed(request)}
        if request.method == "OPTIONS":  # No route takes it, so each request for it ends here.
            return Response(status_code=204, headers=headers)
        detail = "This address does not take this method."
    elif detail == HTTPStatus.NOT_FOUND.phrase:
        detail = "There is nothing at this address."
    return problem(request.url.path, error.status_code, detail, headers=headers)


def _allowed(request: Request) -> str:
    """The methods that this address takes; HEAD wherever GET, and OPTIONS everywhere."""
    methods = {"OPTIONS"}
    for route in request.app.routes:
        if route.matches(request.scope)[0] is not Match.NONE:
            methods |= route.methods
    if "GET" in methods:
        methods.add("HEAD")
    return ", ".join(sorted(methods))


async def _known(request: Request, error: Exception) -> Response:
    status = _STATUS[type(error)]
    if status in _RETRY_LATER:
        log.error("request refused", reason=reason_of(error))
    return problem(request.url.path, status, str(error))


async def _invalid(request: Request, error: Exception) -> Response:
    if isinstance(error, InvalidRequest):
        errors = error.errors
    elif isinstance(error, IdempotencyKeyReused):
        errors = [{"pointer": "/Idempotency-Key", "detail": error.detail}]
    else:
        assert isinstance(error, RequestValidationError)
        errors = [_field(one) for one in error.errors()[:MOST_ERRORS]]
    return problem(
        request.url.path,
        HTTPStatus.UNPROCESSABLE_ENTITY,
        "Some fields of the request are not valid.",
        errors=errors,
    )


def _field(error: dict[str, Any]) -> dict[str, str]:
    """What pydantic found, without the value. Its own messages name limits, never the input."""
    detail = error["msg"].removeprefix("Value error, ")[:LONGEST_DETAIL]
    return {"pointer": _pointer(error["loc"]), "detail": detail}


def _pointer(location: Sequence[str | int]) -> str:
    """A JSON pointer (RFC 6901) to the field; a name that only the client knows may be cut short.

    The first part of the location says where the field was: body, path, query or header.
    """
    parts: list[str] = []
    for part in location[1:]:
        if not _NAME.fullmatch(str(part)) or len(parts) == DEEPEST_POINTER:
            break
        parts.append(str(part))
    return "".join("/" + part for part in parts)
