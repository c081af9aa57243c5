"""Files with a false type, and archives and pictures that are far larger when unpacked.

The service stores and returns the bytes unchanged, and never unpacks them. The headers attachment,
nosniff and sandbox make a browser save each file, and run no script in it. A separate process with
bounded memory makes thumbnails. If it cannot make one, the task fails at once; requests are
answered meanwhile.
"""

import gzip
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from pathlib import Path

import httpx2
import pytest
from fastapi.testclient import TestClient
from starlette.staticfiles import StaticFiles

from tests.support.forms import file_part, form_of, part
from tests.support.measures import MB, Peak, Pulse, idle_p99, most_megabytes
from tests.support.pictures import black_and_white, compressed_text, picture, png
from tests.support.service import Json, files_below, until
from tests.support.target import Target, attacked
from tests.support.torture import Tried, form

BINARY = "application/octet-stream"
SERVER_MEGABYTES = 32
CHILD_MEGABYTES = 1_100  # its limit is a GiB of address space
EDGE = form(3_000, 7_000)  # pixels; the width and height of a picture that is just small enough


@dataclass(frozen=True)
class File:
    """A file, with its declared type, its actual type, and the outcome of its thumbnail task."""

    content: bytes
    name: str
    declared: str
    actual: str
    thumbnail: str | None = None  # the state of its task, if there is one
    sent_as: str | None = None  # the type of its download, if it is another


def zip_bomb(megabytes: int = 20) -> bytes:
    archive = BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as bomb:
        bomb.writestr("zeros", bytes(megabytes * MB))
    return archive.getvalue()


def picture_file(content: bytes, thumbnail: str) -> File:
    kind = "image/webp" if content.startswith(b"RIFF") else "image/png"
    return File(content, "a.png", kind, kind, thumbnail)


SCRIPT = b"<script>alert(1)</script>"


@cache
def files() -> dict[str, File]:
    """Make the files, by name; this takes a while, so it is done when a test needs them."""
    return {
        "HTML behind a PNG's name": File(SCRIPT, "a.png", "image/png", BINARY),
        "a page": File(b"<!DOCTYPE html>" + SCRIPT, "a.png", "image/png", "text/html"),
        "a page that says so": File(SCRIPT, "a.html", "text/html", "text/html"),
        "an SVG": File(b"<svg onload='alert(1)'/>", "a.png", "image/png", "image/svg+xml"),
        "a script": File(
            b"alert(1)", "a.js", "text/javascript", "text/javascript", sent_as="text/plain"
        ),
        "a style sheet": File(
            b"p { color: red }", "a.css", "text/css", "text/css", sent_as="text/plain"
        ),
        "a GIF that is a script": File(
            b"GIF89a=0;" + SCRIPT, "a.gif", "image/gif", "image/gif", "failed"
        ),
        "a program": File(b"MZ\x90\0\x03\0\0\0\x04\0\0\0", "a.txt", "text/plain", BINARY),
        "PostScript": File(
            b"%!PS-Adobe-3.0\n(id) system", "a.png", "image/png", "application/postscript"
        ),
        "a zip bomb": File(zip_bomb(), "a.txt", "text/plain", "application/zip"),
        "a zip bomb in a document": File(
            zip_bomb(), "a.docx", "application/msword", "application/zip"
        ),
        "50 MB in gzip": File(gzip.compress(bytes(50 * MB)), "a.gz", BINARY, "application/x-gzip"),
        "a flood of pixels": picture_file(png(100_000, 100_000), "failed"),
        "the largest picture there can be": picture_file(png(2**31 - 1, 2**31 - 1), "failed"),
        "no pixels": picture_file(png(0, 0), "failed"),
        "a picture that is not there": picture_file(png(5_000, 5_000), "failed"),
        "more pixels than it says": picture_file(png(9, 9, pixels=bytes(50 * MB)), "succeeded"),
        "50 MB of text in a picture": picture_file(compressed_text(50 * MB), "failed"),
        "half a picture": picture_file(picture()[:5_000], "failed"),
        "a few bytes of many pixels": picture_file(black_and_white(EDGE, EDGE), "succeeded"),
        "a little too many pixels": picture_file(black_and_white(7_100, 7_100), "failed"),
    }


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    """A server for this module only, because the tests measure its memory."""
    with attacked(tmp_path_factory.mktemp("contents")) as target:
        yield target


def test_files_are_never_unpacked_and_never_run(target: Target, tried: Tried) -> None:
    idle = idle_p99(target.service.url)
    server = Peak(target.service.pid)
    with Pulse(target.service.url) as pulse:
        queued = {name: send(target, file) for name, file in files().items()}
        for name, file in files().items():
            assert_kept(target, file, queued[name])
        thumbnails = wait_for_thumbnails(target)
    wanted = [file.thumbnail for file in files().values() if file.thumbnail]
    assert sorted(thumbnails) == sorted(wanted)
    uploads = target.service.directory / "uploads"
    on_disk = sum((uploads / name).stat().st_size for name in files_below(uploads))
    sent = sum(len(file.content) for file in files().values())
    child = max(map(most_megabytes, children_of(target.service.pid)))
    tried(
        f"{len(files())} files",
        f"each returned unchanged, {on_disk / sent:.2f} times its size on disk, "
        f"{thumbnails.count('failed')} thumbnails failed at once; "
        f"memory + {server.grown:.0f} MB, {child:.0f} MB in the process of pictures; "
        f"/livez p99 {pulse.p99 * 1000:.0f} ms, idle {idle * 1000:.0f} ms",
    )
    assert on_disk < sent * 1.1 + 300_000
    assert child <= CHILD_MEGABYTES
    assert server.grown <= SERVER_MEGABYTES
    assert pulse.p99 <= form(1.0, 0.1) + 3 * idle


def send(target: Target, file: File) -> Json:
    content_type = b"Content-Type: " + file.declared.encode()
    disposition = b'name="file"; filename="%b"' % file.name.encode()
    response = target.upload(form_of(part(disposition, content_type, content=file.content)))
    queued: Json = response.raise_for_status().json()
    return queued


def assert_kept(target: Target, file: File, queued: Json) -> None:
    """Check that the download is the uploaded file, and that a browser would only save it."""
    target.service.wait_for(queued["id"])
    address = f"/uploads/{queued['upload']['id']}"
    upload = target.service.get(address).json()
    assert (upload["filename"], upload["content_type"]) == (file.name, file.actual)
    download = target.service.get(f"{address}/content")
    assert download.content == file.content
    assert download.headers["content-type"].partition(";")[0] == (file.sent_as or file.actual)
    assert is_only_saved(download)


def is_only_saved(download: httpx2.Response) -> bool:
    """Return whether the headers make a browser save the file, and run no script in it."""
    headers = download.headers
    return (
        headers.get("content-disposition", "").startswith("attachment")
        and headers.get("x-content-type-options") == "nosniff"
        and headers.get("content-security-policy") == "sandbox"
    )


def wait_for_thumbnails(target: Target) -> list[str]:
    """Return the status of each thumbnail task, which must have ended at its first attempt."""

    def tasks() -> list[Json]:
        found: list[Json] = target.service.get("/tasks?kind=make_thumbnail").json()["data"]
        return found

    until(lambda: all(task["finished_at"] for task in tasks()), within=60, what="no thumbnails")
    for task in tasks():
        assert task["attempts"] == 1
        assert task["status"] == "succeeded" or task["error"]["detail"]
    return [task["status"] for task in tasks()]


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_the_thumbnail_of_a_broken_picture_is_not_found(target: Target) -> None:
    file = files()["half a picture"]
    queued = send(target, file)
    assert_kept(target, file, queued)
    wait_for_thumbnails(target)
    target.refused(target.service.get(f"/uploads/{queued['upload']['id']}/thumbnail"), 404)


def test_a_browser_saves_a_thumbnail_like_any_file(target: Target) -> None:
    file = picture_file(picture(), "succeeded")
    queued = send(target, file)
    assert_kept(target, file, queued)
    wait_for_thumbnails(target)
    assert is_only_saved(target.service.get(f"/uploads/{queued['upload']['id']}/thumbnail"))


@pytest.mark.usefixtures("leaves_no_traces")
def test_a_compressed_body_is_never_unpacked(target: Target) -> None:
    body = gzip.compress(form_of(file_part(content=bytes(20 * MB))))
    target.refused(target.upload(body, **{"Content-Encoding": "gzip"}), 415)
    target.refused(target.upload(body), 400)


# Negative controls

NAIVE = """
import resource, sys
from PIL import Image
with Image.open(sys.argv[1]) as picture:
    picture.convert("RGB").thumbnail((256, 256))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 // 1_000_000)
"""


def test_control_pillow_by_itself_unpacks_a_small_file_to_hundreds_of_megabytes(
    tmp_path: Path, tried: Tried
) -> None:
    """Pillow only warns at its own limit of 89 million pixels; it raises at twice as many."""
    content = black_and_white(9_400, 9_400)
    path = tmp_path / "a.png"
    path.write_bytes(content)
    done = subprocess.run([sys.executable, "-c", NAIVE, path], capture_output=True, check=True)
    megabytes = int(done.stdout)
    tried(f"plain Pillow, a PNG of {len(content) / 1000:.0f} KB", f"{megabytes} MB of memory")
    assert megabytes > 300


def test_control_staticfiles_shows_the_page_of_an_attacker(tmp_path: Path, tried: Tried) -> None:
    """Tutorials serve uploads with StaticFiles."""
    file = files()["a page that says so"]
    (tmp_path / file.name).write_bytes(file.content)
    download = TestClient(StaticFiles(directory=tmp_path)).get(f"/{file.name}")
    assert download.headers["content-type"].startswith("text/html")
    assert not is_only_saved(download)
    tried("a page behind StaticFiles", "sent as text/html, so a browser shows it")
