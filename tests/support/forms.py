"""Multipart forms built byte by byte, also malformed ones that no client library writes."""

from collections.abc import Iterator

CLOSE = b"Host: localhost\r\nConnection: close\r\n"
FORM = {"Content-Type": "multipart/form-data; boundary=b"}


def form_of(*parts: bytes, end: bytes | None = None, boundary: bytes = b"b") -> bytes:
    """Return a form of these parts. `end` replaces the closing delimiter, for malformed forms."""
    end = b"--%b--\r\n" % boundary if end is None else end
    return b"".join(b"--%b\r\n%b\r\n" % (boundary, part) for part in parts) + end


def part(disposition: bytes, *headers: bytes, content: bytes = b"Hello") -> bytes:
    """Return one part of a form."""
    return b"\r\n".join([b"Content-Disposition: form-data; " + disposition, *headers, b"", content])


def file_part(name: bytes = b"a.bin", content: bytes = b"Hello") -> bytes:
    """Return the part named `file`, which `POST /upload` reads."""
    return part(b'name="file"; filename="%b"' % name, content=content)


def posted(
    path: str,
    body: bytes,
    content_type: bytes = FORM["Content-Type"].encode(),
    *,
    length: int | None = None,
    chunked: bool = False,
) -> bytes:
    """Return a POST request with this body.

    The body is sent in chunks, or with a Content-Length. `length` gives a false Content-Length.
    """
    framing = b"Content-Length: %d" % (len(body) if length is None else length)
    if chunked:
        framing = b"Transfer-Encoding: chunked"
        body = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in _pieces(body))
        body += b"0\r\n\r\n"
    lines = (b"POST %b HTTP/1.1\r\n" % path.encode(), CLOSE, b"Content-Type: %b\r\n" % content_type)
    return b"".join((*lines, framing, b"\r\n\r\n", body))


def _pieces(body: bytes) -> Iterator[bytes]:
    for start in range(0, len(body), 65_536):
        yield body[start : start + 65_536]
