"""Paths behind a proxy that serves the API under a prefix, the root path.

In ASGI, the `path` of a request begins with its `root_path`. Use `route_path` to compare it with
the path of a route.
"""

from starlette.types import Scope

from app.observability.paths import path_of_route

_PAGES = ("/board/", "/inbox/")


def route_path(scope: Scope) -> str:
    """Return the path of a request without the prefix, as the routes have it."""
    return scope["path"][len(scope.get("root_path", "")) :]  # type: ignore[no-any-return]


def is_page(path: str) -> bool:
    """Whether the path of a route belongs to the pages for people."""
    return path == "/" or path.startswith(_PAGES) or path in {"/board", "/inbox"}


def with_prefix(scope: Scope, prefix: str) -> Scope:
    """Return the scope with this prefix as its `root_path` and at the beginning of its `path`.

    It does not matter whether the proxy strips the prefix from the path. For example, with the
    prefix /afterward both /tasks and /afterward/tasks become /afterward/tasks. A server that has a
    root path itself (`uvicorn --root-path`) adds it to every path, so it is stripped first.
    """
    return {**scope, "path": prefix + path_of_route(scope, prefix), "root_path": prefix}
