"""The path of a request without the prefix of a proxy, for rules about single routes."""

from collections.abc import MutableMapping
from typing import Any


def path_of_route(scope: MutableMapping[str, Any], root_path: str) -> str:
    """Return the path of a request as its route has it.

    `root_path` is ROOT_PATH. A server with a root path of its own (`uvicorn --root-path`) adds that
    to every path.
    """
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", "")).removeprefix(root_path)
