"""Uploads: what comes back is what was sent, whatever it is called and whatever is in it."""

import hashlib
import os
import socket
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from PIL import Image

from tests.api.requests import MAX_UPLOAD_BYTES, problem_of, upload_of
from tests.support.service import Service, files_below, wait_for

FORM = {"Content-Type": "multipart/form-data; boundary=b"}
BEFORE = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.bin"\r\n\r\n'
AFTER = b"\r\n--b--\r\n"
KIB = 1024


def published(
    client: TestClient, content: bytes, name: str = "a.bin", kind: str = "application/octet-stream"
) -> dict[str, Any]:
    """Upload a file and wait until it is published; returns what is known of it then."""
    queued = upload_of(content, name, kind).send(client).raise_for_status().json()
    wait_for(client, queued["id"])
    upload: dict[str, Any] = client.get(f"/uploads/{queued['upload']['id']}").json()
    return upload


def picture(width: int = 600, height: int = 300) -> bytes:
    png = BytesIO()
    Image.effect_noise((width, height), 50).save(png, "PNG")
    return png.getvalue()


# There and back.


@pytest.mark.parametrize("size", [0, 1, 65_535, 65_537, MAX_UPLOAD_BYTES])
def test_a_download_is_what_was_uploaded(client: TestClient, size: int) -> None:
    content = os.urandom(size)
    upload = published(client, content)
    assert (upload["size"], upload["sha256"]) == (size, hashlib.sha256(content).hexdigest())
    assert client.get(f"/uploads/{upload['id']}/content").content == content


def test_the_bytes_are_on_disk_before_the_answer(idle_client: TestClient, tmp_path: Path) -> None:
    upload = upload_of(b"Hello").send(idle_client).json()["upload"]
    (file,) = files_below(tmp_path / "uploads")
    assert (tmp_path / "uploads" / file).read_bytes() == b"Hello"
    assert idle_client.get(f"/uploads/{upload['id']}").json()["status"] == "received"
    problem_of(idle_client.get(f"/uploads/{upload['id']}/content"), 409)


def test_a_download_is_saved_by_a_browser_and_never_shown(client: TestClient) -> None:
    upload = published(client, b"<script>alert(1)</script>", "page.html", "text/html")
    headers = client.get(f"/uploads/{upload['id']}/content").headers
    assert headers["content-disposition"] == "attachment; filename*=UTF-8''page.html"
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["content-security-policy"] == "sandbox"


def test_a_download_can_be_continued(client: TestClient) -> None:
    upload = published(client, b"0123456789")
    rest = client.get(f"/uploads/{upload['id']}/content", headers={"Range": "bytes=7-"})
    assert (rest.status_code, rest.content) == (206, b"789")


def test_the_newest_uploads_come_first_page_by_page(client: TestClient) -> None:
    sent = [upload_of(name=f"{n}.txt").send(client).json()["upload"]["id"] for n in range(5)]
    first = client.get("/uploads?limit=2").json()
    second = client.get(f"/uploads?limit=2&after={first['data'][-1]['id']}").json()
    last = client.get(f"/uploads?limit=2&after={second['data'][-1]['id']}").json()
    assert [page["has_more"] for page in (first, second, last)] == [True, True, False]
    listed = [upload["id"] for page in (first, second, last) for upload in page["data"]]
    assert sorted(listed) == sorted(sent)
    assert listed[0] == sent[-1]


def test_a_deleted_upload_is_gone_with_its_bytes(client: TestClient, tmp_path: Path) -> None:
    upload = published(client, b"Hello")
    response = client.delete(f"/uploads/{upload['id']}")
    assert (response.status_code, response.content) == (204, b"")
    assert files_below(tmp_path / "uploads") == []
    assert client.get("/uploads").json()["data"] == []
    for part in ("", "/content", "/thumbnail"):
        problem_of(client.get(f"/uploads/{upload['id']}{part}"), 404)
    problem_of(client.delete(f"/uploads/{upload['id']}"), 404)


def test_an_upload_that_was_deleted_before_its_task_ran_stays_deleted(
    client: TestClient, tmp_path: Path
) -> None:
    queued = upload_of().send(client).json()
    client.delete(f"/uploads/{queued['upload']['id']}")
    wait_for(client, queued["id"])
    assert files_below(tmp_path / "uploads") == []


# Pictures.


def thumbnail_task(client: TestClient, status: str) -> dict[str, Any]:
    (task,) = client.get("/tasks?kind=make_thumbnail").json()["data"]
    return wait_for(client, task["id"], status)


def test_a_picture_gets_a_small_one(client: TestClient) -> None:
    upload = published(client, picture(), "noise.png", "image/png")
    assert upload["content_type"] == "image/png"
    thumbnail_task(client, "succeeded")
    response = client.get(f"/uploads/{upload['id']}/thumbnail")
    assert response.headers["content-type"] == "image/png"
    assert response.headers["x-content-type-options"] == "nosniff"
    with Image.open(BytesIO(response.content)) as small:
        assert (small.format, small.size) == ("PNG", (256, 128))


def pixel_flood() -> bytes:
    """A PNG of a few bytes that says it has ten thousand million pixels."""
    header = b"IHDR" + (100_000).to_bytes(4) * 2 + b"\x08\x02\0\0\0"
    return b"\x89PNG\r\n\x1a\n\0\0\0\r" + header + zlib.crc32(header).to_bytes(4)


@pytest.mark.parametrize(
    "content", [pixel_flood(), picture()[:5000]], ids=["pixel flood", "half a picture"]
)
def test_a_picture_that_cannot_be_shown_fails_cleanly(client: TestClient, content: bytes) -> None:
    upload = published(client, content, "a.png", "image/png")
    task = thumbnail_task(client, "failed")
    assert task["attempts"] == 1
    assert task["error"]["detail"]
    problem_of(client.get(f"/uploads/{upload['id']}/thumbnail"), 404)
    assert client.get(f"/uploads/{upload['id']}/content").content == content


# Contents that are not what they say.


def zip_bomb() -> bytes:
    archive = BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as bomb:
        bomb.writestr("zeros", bytes(50 * KIB * KIB))
    return archive.getvalue()


@pytest.mark.parametrize(
    ("content", "name", "declared", "actual"),
    [
        (b"<script>alert(1)</script>", "a.png", "image/png", "application/octet-stream"),
        (b"<svg onload='alert(1)'/>", "a.png", "image/png", "image/svg+xml"),
        (b"MZ\x90\0\x03\0\0\0\x04\0\0\0", "a.txt", "text/plain", "application/octet-stream"),
        (zip_bomb(), "a.txt", "text/plain", "application/zip"),
        (b"plain words", "a.txt", "text/plain", "text/plain"),
    ],
    ids=["HTML", "SVG", "program", "zip bomb", "text"],
)
def test_the_bytes_decide_what_a_file_is(
    client: TestClient, tmp_path: Path, content: bytes, name: str, declared: str, actual: str
) -> None:
    upload = published(client, content, name, declared)
    assert (upload["filename"], upload["content_type"]) == (name, actual)
    response = client.get(f"/uploads/{upload['id']}/content")
    assert response.headers["content-type"].partition(";")[0] == actual
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["content-disposition"].startswith("attachment")
    assert response.content == content
    assert files_below(tmp_path / "uploads") == [f"published/{upload['id']}"]


# Names.


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        (b"../../etc/passwd", "passwd"),
        (b"/etc/passwd", "passwd"),
        (b"C:\\\\Windows\\\\a.txt", "a.txt"),
        (b"CON", "CON"),
        (b".bashrc", ".bashrc"),
        (b"..", "upload"),
        (b" ", "upload"),
        ("naïve café 😀.txt".encode(), "naïve café 😀.txt"),
        (b"a;b=c.txt", "a;b=c.txt"),
        (b"x" * 255, "x" * 255),
    ],
    ids=lambda value: None if isinstance(value, bytes) else value[:20],
)
def test_a_name_is_shown_and_never_used(
    client: TestClient, tmp_path: Path, name: bytes, shown: str
) -> None:
    body = BEFORE.replace(b"a.bin", name) + b"Hello" + AFTER
    queued = client.post("/upload", content=body, headers=FORM).json()
    wait_for(client, queued["id"])
    upload = queued["upload"]
    assert upload["filename"] == shown
    assert files_below(tmp_path / "uploads") == [f"published/{upload['id']}"]
    headers = client.get(f"/uploads/{upload['id']}/content").headers
    assert headers["content-disposition"].isascii()


@pytest.mark.parametrize(
    "name", [b"", b"a\0b", b"a\x1b[2Jb", "a\u202eb".encode(), b"\xff", b"x" * 256, b"=?utf-8?q?a?="]
)
def test_a_name_that_could_mislead_is_refused(
    client: TestClient, tmp_path: Path, name: bytes
) -> None:
    body = BEFORE.replace(b"a.bin", name) + b"Hello" + AFTER
    response = client.post("/upload", content=body, headers=FORM)
    assert problem_of(response, 422)["errors"][0]["pointer"] == "/file"
    assert files_below(tmp_path / "uploads") == []


def test_a_planted_link_leads_nowhere(client: TestClient, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret")
    upload = published(client, b"Hello")
    file = tmp_path / "uploads" / "published" / upload["id"]
    file.unlink()
    file.symlink_to(secret)
    problem_of(client.get(f"/uploads/{upload['id']}/content"), 404)
    client.delete(f"/uploads/{upload['id']}")
    assert secret.read_text() == "secret"


# Sizes and broken connections, on a real server.


def pieces(body: bytes) -> Iterator[bytes]:
    """A body whose length is not told beforehand."""
    for start in range(0, len(body), 64 * KIB):
        yield body[start : start + 64 * KIB]


@pytest.mark.parametrize("announced", [True, False])
@pytest.mark.parametrize(("size", "status"), [(-1, 202), (0, 202), (1, 413), (300_000, 413)])
def test_the_limit_counts_whether_or_not_the_length_is_told(
    service: Service, size: int, status: int, *, announced: bool
) -> None:
    body = BEFORE + bytes(MAX_UPLOAD_BYTES + size) + AFTER
    before = files_below(service.directory / "uploads")
    content = body if announced else pieces(body)
    response = service.post("/upload", content=content, headers=FORM)
    assert response.status_code == status
    if status == 202:
        service.wait_for(response.json()["id"])
    else:
        problem_of(response, 413)
        assert files_below(service.directory / "uploads") == before


@pytest.mark.parametrize(
    "body",
    [
        b"\r\n" * 4 * KIB * KIB + BEFORE + AFTER,
        BEFORE + AFTER + b"x" * 300_000,
        (BEFORE.replace(b'"file"', b'"x"') + b"x\r\n") * 1001 + AFTER,
        BEFORE,
    ],
    ids=["8 MB of line breaks", "much after the end", "1,001 parts", "no end"],
)
def test_a_hostile_form_is_refused_within_a_second(service: Service, body: bytes) -> None:
    before = files_below(service.directory / "uploads")
    began = time.monotonic()
    problem_of(service.post("/upload", content=pieces(body), headers=FORM), 400, 413, 422)
    assert time.monotonic() - began < 1
    assert files_below(service.directory / "uploads") == before


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize(
    "framing", [b"Content-Length: 100000", b"Transfer-Encoding: chunked"], ids=bytes.decode
)
def test_a_client_that_goes_away_leaves_no_file_and_is_no_error(
    service: Service, framing: bytes
) -> None:
    errors = service.log.count('"level":"error"')
    incoming = service.directory / "uploads" / "incoming"
    part = BEFORE + b"half"
    chunk = part if b"Length" in framing else b"%x\r\n%s\r\n" % (len(part), part)
    head = b"POST /upload HTTP/1.1\r\nHost: x\r\nContent-Type: %s\r\n%s\r\n\r\n"
    with socket.create_connection(("127.0.0.1", service.port)) as connection:
        connection.sendall(head % (FORM["Content-Type"].encode(), framing) + chunk)
        wait_until(lambda: files_below(incoming) != [])
    wait_until(lambda: files_below(incoming) == [])
    assert service.get("/livez").is_success
    assert service.log.count('"level":"error"') == errors
