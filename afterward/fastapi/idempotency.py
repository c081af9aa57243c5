"""Idempotency keys: a repeated request queues nothing more, and gets the first response again.

The header is described in draft-ietf-httpapi-idempotency-key-header. A client that got no response
sends its request again with the same key. So it cannot queue the tasks of one request twice.
"""

import hashlib
import re

from fastapi import Request, Response
from starlette.exceptions import HTTPException
from starlette.types import Scope

from afterward.task import Answer

_SAFE_METHODS = ("GET", "HEAD", "OPTIONS", "TRACE")
# 1 to 255 visible ASCII characters, bare or as a quoted string.
_KEY = re.compile(r'"([!#-~]{1,255})"|([!#-~][!-~]{0,254})')


class IdempotencyKeyReused(HTTPException):
    """The key was used for another request before. The response is 422.

    `RequestUnitOfWork.commit` raises it.
    """

    def __init__(self) -> None:
        super().__init__(422, "This Idempotency-Key was used before, for another request.")


def read_key(request: Request, client: str) -> str | None:
    """Return the request's idempotency key under its client's name; None if it has no key.

    Two clients may use the same key. So the result is "CLIENT KEY", or "KEY" where `client` is
    empty. A safe method (RFC 9110, section 9.2.1) changes nothing, so its header is ignored. Raises
    HTTPException 400 for a malformed header.
    """
    header = request.headers.get("idempotency-key")
    if header is None or request.method in _SAFE_METHODS:
        return None
    # The key cannot contain a space, so the last space of the result ends the client's name.
    match = _KEY.fullmatch(header)
    if match is None:
        raise HTTPException(
            400, "An Idempotency-Key is 1 to 255 visible ASCII characters, quoted or bare."
        )
    return f"{client} {match[1] or match[2]}".lstrip()


def answer_to_store(
    key: str, request: Request, body: bytes, response: Response, now: float
) -> Answer:
    """Return the response in the form in which it is stored beside the tasks.

    `body` is the body of the request, or a digest of it. `now` is in seconds since the epoch. The
    answer has the body of the response, which must be UTF-8, and its Location, but no other header.
    It also has a fingerprint of the request: the SHA-256 of its method, path, query and body. A
    later request with this key is a repetition if it has the same fingerprint.
    """
    asked = f"{request.method} {_route_path(request.scope)}?{request.url.query}\n".encode()
    return Answer(
        key=key,
        fingerprint=hashlib.sha256(asked + body).hexdigest(),
        body=bytes(response.body).decode(),
        location=response.headers.get("Location", ""),
        created_at=now,
    )


def replay(answer: Answer) -> Response:
    """Return the stored body and Location as a JSON response with `Idempotency-Replay: true`."""
    headers = {"Idempotency-Replay": "true"}
    if answer.location:
        headers["Location"] = answer.location
    return Response(answer.body, 202, headers, media_type="application/json")


def _route_path(scope: Scope) -> str:
    """Return the path without the prefix of a proxy, because the prefix may change.

    In ASGI the `path` begins with the `root_path`.
    """
    # Starlette's Mount adds its path to the `root_path`. The mounted app's path stays, because the
    # same path in two mounted apps means two things; only the proxy's prefix is removed.
    prefix = scope.get("app_root_path", scope.get("root_path", ""))
    return scope["path"].removeprefix(prefix)  # type: ignore[no-any-return]
