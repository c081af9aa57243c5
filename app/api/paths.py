"""Paths behind a proxy that shows the service under a prefix, its root path.

As ASGI has it, the `path` of a scope begins with its `root_path`. A comparison with the path of a
route asks `route_path`.
"""

from starlette.types import Scope


def route_path(scope: Scope) -> str:
    """The path of a request as the routes name it, without the prefix."""
    return scope["path"][len(scope.get("root_path", "")) :]  # type: ignore[no-any-return]


def with_prefix(scope: Scope, prefix: str) -> Scope:
    """Return the scope with this prefix as its `root_path`, and a path that begins with it.

    A proxy strips the prefix, or leaves it in the path: both are understood. A server with a root
    path of its own (`uvicorn --root-path`) has put that before whatever path it received.
    """
    path = _strip(_strip(scope["path"], scope.get("root_path", "")), prefix)
    return {**scope, "path": prefix + path, "root_path": prefix}


def _strip(path: str, prefix: str) -> str:
    if not path.startswith(prefix):
        return path
    rest = path[len(prefix) :] or "/"
    return rest if rest.startswith("/") else path
