"""The style sheet, the script and the icon of the pages, from app/static."""

import hashlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

_FOLDER = Path(__file__).parents[1] / "static"
_MEDIA_TYPES = {
    "board.css": "text/css; charset=utf-8",
    "board.js": "text/javascript; charset=utf-8",
    "icon.svg": "image/svg+xml",
}

STATIC_PATHS = {f"/board/static/{name}": name for name in _MEDIA_TYPES}
"""The names of the files by the paths that serve them."""


@dataclass(frozen=True, slots=True)
class StaticFile:
    """A file that pages load. `version` is a digest of its content."""

    content: bytes
    media_type: str
    version: str


@cache
def static_file(name: str) -> StaticFile:
    """Read a file once; later calls return it from memory."""
    content = (_FOLDER / name).read_bytes()
    return StaticFile(content, _MEDIA_TYPES[name], hashlib.sha256(content).hexdigest()[:16])


def static_url(name: str) -> str:
    """Return the path and query under which a page loads a file.

    The query has the file's version. So a browser may keep the file for a year, and still loads the
    new file after an update.
    """
    return f"/board/static/{name}?v={static_file(name).version}"
