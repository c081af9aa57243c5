"""The cookie with the API key of a browser that has signed in."""

from collections.abc import Iterable
from urllib.parse import quote, unquote_to_bytes

from fastapi import Request, Response

NAME = "afterward_key"


def keep_key(request: Request, response: Response, key: str) -> None:
    """Let the browser send this key with each request, until it is closed or signs out.

    Scripts cannot read the cookie, and other sites cannot make the browser send it. It is for https
    only if the browser came by https. A proxy may hide that from the server, but the browser's
    Origin shows it.
    """
    origin = request.headers.get("origin", "")
    response.set_cookie(
        NAME,
        quote(key, safe=""),
        path=_path(request),
        secure=request.url.scheme == "https" or origin.startswith("https://"),
        httponly=True,
        samesite="strict",
    )


def forget_key(request: Request, response: Response) -> None:
    """Let the browser remove the cookie."""
    response.delete_cookie(NAME, path=_path(request), httponly=True, samesite="strict")


def key_in_cookie(headers: Iterable[tuple[bytes, bytes]]) -> bytes | None:
    """Return the key in the cookies of a request; None if there is no cookie of this name.

    Of several, the first one counts: a browser sends that of the longest path first (RFC 6265,
    section 5.4).
    """
    for header, value in headers:
        if header == b"cookie":
            for pair in value.split(b";"):
                name, _, quoted = pair.strip().partition(b"=")
                if name == NAME.encode():
                    return unquote_to_bytes(quoted)
    return None


def _path(request: Request) -> str:
    return request.scope.get("root_path", "") or "/"
