"""Errors as problem+json (RFC 9457).

A problem is small, and never repeats what the client sent.
"""

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
    DiskFull,
    QueueDamaged,
    QueueUnavailable,
    RecordNotFound,
    TaskHasStarted,
    TaskNotFound,
    TaskNotGivenUp,
    TaskNotRetrying,
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

# With these limits a problem stays under 4 KB.
MOST_ERRORS = 10  # invalid fields of one request
LONGEST_DETAIL = 120  # characters about one field
DEEPEST_POINTER = 3  # parts of a JSON pointer
_NAME = re.compile(r"[A-Za-z0-9_-]{1,40}")

# The errors of the queue and of the store, with their status. Clients get their messages as detail.
_STATUS: dict[type[Exception], HTTPStatus] = {
    TaskNotFound: HTTPStatus.NOT_FOUND,
    RecordNotFound: HTTPStatus.NOT_FOUND,
    BatchNotFound: HTTPStatus.NOT_FOUND,
    NoSuchUpload: HTTPStatus.NOT_FOUND,
    TaskHasStarted: HTTPStatus.CONFLICT,
    TaskNotGivenUp: HTTPStatus.CONFLICT,
    TaskNotRetrying: HTTPStatus.CONFLICT,
    UploadTooLarge: HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    BacklogFull: HTTPStatus.SERVICE_UNAVAILABLE,
    CommitUnknown: HTTPStatus.SERVICE_UNAVAILABLE,
    QueueUnavailable: HTTPStatus.SERVICE_UNAVAILABLE,
    QueueDamaged: HTTPStatus.SERVICE_UNAVAILABLE,
    StoreUnavailable: HTTPStatus.SERVICE_UNAVAILABLE,
    DiskFull: HTTPStatus.INSUFFICIENT_STORAGE,
    StoreFull: HTTPStatus.INSUFFICIENT_STORAGE,
}
# The names of RFC 9110, which HTTPStatus has since Python 3.13.
_TITLES = {413: "Content Too Large", 422: "Unprocessable Content"}
# Every route may answer with these: a malformed request, a missing or wrong API key, a forbidden
# web page or recipient, too many requests, an unexpected error.
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
    """An invalid field that a route finds. It is answered with 422, like errors of validation.

    `pointer` is the JSON pointer of the field (RFC 6901).
    """

    def __init__(self, pointer: str, detail: str) -> None:
        super().__init__(detail)
        self.errors = [{"pointer": pointer, "detail": detail}]


def install(app: FastAPI) -> None:
    """Answer the errors of `app` with problems, and describe a problem in its OpenAPI document."""
    app.add_exception_handler(HTTPException, _answer_http_exception)
    app.add_exception_handler(RequestValidationError, _answer_invalid_request)
    app.add_exception_handler(InvalidRequest, _answer_invalid_request)
    app.add_exception_handler(IdempotencyKeyReused, _answer_invalid_request)
    for error in _STATUS:
        app.add_exception_handler(error, _answer_known_error)
    _add_schema(app)


def _add_schema(app: FastAPI) -> None:
    """Add the schema of a problem to the OpenAPI document, once for all the errors that use it."""
    describe = app.openapi
    schema = ProblemSchema.model_json_schema(ref_template=_SCHEMAS + "{model}")
    schemas = schema.pop("$defs") | {"Problem": schema}

    def openapi() -> dict[str, Any]:
        document = describe()
        document["components"]["schemas"] |= schemas
        return document

    app.openapi = openapi  # type: ignore[method-assign]


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return the `responses` of a route that has these errors, and those that every route has."""
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
    """Return an error as a response. `path` is the path of the request, for `instance`.

    `errors` are the invalid fields. Errors that a retry may solve get a Retry-After.
    """
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


async def _answer_http_exception(request: Request, error: Exception) -> Response:
    """Answer an error that a route, FastAPI or Starlette has raised."""
    assert isinstance(error, HTTPException)
    detail, headers = error.detail, error.headers
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        # Starlette allows only the methods of the first route that matches the path.
        headers = {"Allow": _allowed_methods(request)}
        if request.method == "OPTIONS":  # no route has this method, so all of its requests get here
            return Response(status_code=204, headers=headers)
        detail = "This path does not allow this method. See the Allow header."
    elif detail == HTTPStatus.NOT_FOUND.phrase:
        detail = "There is nothing at this path."
    return problem(request.url.path, error.status_code, detail, headers=headers)


def _allowed_methods(request: Request) -> str:
    """Return the methods of every route at this path. GET implies HEAD; OPTIONS always works."""
    methods = {"OPTIONS"}
    for route in request.app.routes:
        if route.matches(request.scope)[0] is not Match.NONE:
            methods |= route.methods
    if "GET" in methods:
        methods.add("HEAD")
    return ", ".join(sorted(methods))


async def _answer_known_error(request: Request, error: Exception) -> Response:
    """Answer an error of the queue or of the store. Log the cause if the service cannot work."""
    status = _STATUS[type(error)]
    if status in _RETRY_LATER:
        log.error("request refused", reason=reason_of(error))
    return problem(request.url.path, status, str(error))


async def _answer_invalid_request(request: Request, error: Exception) -> Response:
    """Answer 422 with the invalid fields."""
    if isinstance(error, InvalidRequest):
        errors = error.errors
    elif isinstance(error, IdempotencyKeyReused):
        errors = [{"pointer": "/Idempotency-Key", "detail": error.detail}]
    else:
        assert isinstance(error, RequestValidationError)
        errors = [_invalid_field(details) for details in error.errors()[:MOST_ERRORS]]
    return problem(
        request.url.path,
        HTTPStatus.UNPROCESSABLE_ENTITY,
        "Some fields of the request are not valid.",
        errors=errors,
    )


def _invalid_field(error: dict[str, Any]) -> dict[str, str]:
    return {"pointer": _pointer(error["loc"]), "detail": message_of(error)[:LONGEST_DETAIL]}


def message_of(error: Mapping[str, Any]) -> str:
    """Return the message of an error of pydantic. It names limits, and never the input."""
    if _is_too_long(error):
        return f"must have at most {error['ctx']['max_length']:,} characters"
    return str(error["msg"]).removeprefix("Value error, ")


def _is_too_long(error: Mapping[str, Any]) -> bool:
    """Whether the error is about a text with too many characters.

    If the text has a check of ours, too, then pydantic calls its characters "items".
    """
    kind = error.get("type")
    return kind == "string_too_long" or (
        kind == "too_long" and error["ctx"]["field_type"] == "Value"
    )


def _pointer(location: Sequence[str | int]) -> str:
    """Return a JSON pointer (RFC 6901) to the field.

    The first part of the location is left out: it is "body", "path", "query" or "header". The
    pointer ends before a name of unusual form, because such a name comes from the client. For
    example, ("body", "recipients", 3) is "/recipients/3".
    """
    parts: list[str] = []
    for part in location[1:]:
        if not _NAME.fullmatch(str(part)) or len(parts) == DEEPEST_POINTER:
            break
        parts.append(str(part))
    return "".join("/" + part for part in parts)
