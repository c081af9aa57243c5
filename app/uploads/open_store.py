"""Opens the store that a URL names: a directory of this machine, or a bucket."""

import re
from pathlib import Path

from app.uploads.store import CannotOpenStore, Store


def open_store(url: str) -> Store:
    """Return the store for a URL: `file:var/uploads`, `file:/var/uploads` or `s3://bucket/prefix`.

    A file: URL has the form of RFC 8089. The prefix of an s3: URL is optional. The store is not
    accessed before its first use. Raises ValueError for any other URL, and CannotOpenStore if the
    package for S3 is missing or its settings are wrong.
    """
    scheme, _, place = url.partition(":")
    if scheme == "s3" and re.match("//[^/]", place):
        bucket, _, prefix = place.removeprefix("//").partition("/")
        try:
            from app.uploads.s3 import S3Store
        except ModuleNotFoundError as error:
            raise CannotOpenStore(
                f"UPLOAD_URL: S3 needs {error.name}: run pip install {error.name}"
            ) from error
        return S3Store(bucket, prefix.rstrip("/"))
    if scheme != "file":
        raise ValueError("An upload store's URL begins with file: or s3://")
    if not place or re.match("//[^/]", place):
        raise ValueError("A file: URL is file:relative/path or file:/absolute/path")
    from app.uploads.local import LocalStore

    return LocalStore(Path(place))
