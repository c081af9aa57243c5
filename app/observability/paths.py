"""The path of a request without the prefix of a proxy."""

from collections.abc import MutableMapping
from typing import Any


def path_of_route(scope: MutableMapping[str, Any], root_path: str) -> str:
    """Return the path of a request as its route has it.

    `root_path` is ROOT_PATH. A server with a root path of its own (`uvicorn --root-path`) adds that
    to every path.
    """
    return _strip(_strip(scope["path"], scope.get("root_path", "")), root_path)


def _strip(path: str, prefix: str) -> str:
    """Remove a prefix that ends where a part of the path ends: /live is none of /livez."""
    if not path.startswith(prefix):
        return path
    rest = path[len(prefix) :] or "/"
    return rest if rest.startswith("/") else path
