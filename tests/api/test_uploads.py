"""Uploads: what comes back is what was sent, whatever it is called and whatever is in it."""

import base64
import errno
import hashlib
import os
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from PIL import Image
from structlog.testing import capture_logs

from tests.api.requests import MAX_UPLOAD_BYTES, PROMISES, Call, problem_of, upload_of
from tests.support.forms import FORM, form_of, part
from tests.support.pictures import picture
from tests.support.service import files_below, wait_for


def published(
    client: TestClient, content: bytes, name: str = "a.bin", kind: str = "application/octet-stream"
) -> dict[str, Any]:
    """Upload a file and wait until it is published; returns what is known of it then."""
    queued = upload_of(content, name, kind).send(client).raise_for_status().json()
    wait_for(client, queued["id"])
    upload: dict[str, Any] = client.get(f"/uploads/{queued['upload']['id']}").json()
    return upload


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
    assert headers["content-disposition"].startswith("attachment;")
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["content-security-policy"] == "sandbox"


def test_a_download_can_be_continued(client: TestClient) -> None:
    upload = published(client, b"0123456789")
    rest = client.get(f"/uploads/{upload['id']}/content", headers={"Range": "bytes=7-"})
    assert (rest.status_code, rest.content) == (206, b"789")


# Files that are not sent as they are.


def encoded(content: bytes, *headers: bytes) -> Call:
    """An upload whose part has such headers."""
    body = form_of(part(b'name="file"; filename="a.bin"', *headers, content=content))
    return Call("/upload", {"content": body, "headers": FORM})


@pytest.mark.parametrize("encoding", ["base64", "quoted-printable", "binary"])
def test_an_encoded_file_is_stored_as_it_was(client: TestClient, encoding: str) -> None:
    content = os.urandom(MAX_UPLOAD_BYTES)
    text = {
        "base64": base64.encodebytes(content),
        "quoted-printable": b"".join(b"=%02X" % byte for byte in content),
        "binary": content,
    }
    call = encoded(text[encoding], b"Content-Transfer-Encoding: " + encoding.encode())
    queued = call.send(client).raise_for_status().json()
    upload = queued["upload"]
    assert (upload["size"], upload["sha256"]) == (
        len(content),
        hashlib.sha256(content).hexdigest(),
    )
    wait_for(client, queued["id"])
    assert client.get(f"/uploads/{upload['id']}/content").content == content


def test_the_limit_is_that_of_the_file_and_not_of_its_encoding(client: TestClient) -> None:
    header = b"Content-Transfer-Encoding: base64"
    too_large = base64.b64encode(bytes(MAX_UPLOAD_BYTES + 1))
    problem_of(encoded(too_large, header).send(client), 413)


@pytest.mark.parametrize(
    ("header", "content", "status"),
    [
        (b"Content-Transfer-Encoding: base64", b"Hello!", 400),
        (b"Content-Transfer-Encoding: quoted-printable", b"100=", 202),
        (b"Content-Transfer-Encoding: quoted-printable", b"1 = 1", 400),
        (b"Content-Transfer-Encoding: x-uuencode", b"Hello", 415),
        (b"Content-Encoding: gzip", b"Hello", 415),
    ],
)
def test_a_file_that_cannot_be_decoded_is_not_kept(
    idle_client: TestClient, tmp_path: Path, header: bytes, content: bytes, status: int
) -> None:
    response = encoded(content, header).send(idle_client)
    assert response.status_code == status
    assert len(files_below(tmp_path / "uploads")) == (status == 202)


@pytest.mark.parametrize(
    "call", [upload_of(), PROMISES[0], PROMISES[2]], ids=lambda call: call.path
)
@pytest.mark.parametrize("coding", ["gzip", "br", "deflate", "identity, GZIP", "aes128gcm"])
def test_a_compressed_body_is_refused_with_a_word_about_what_is_taken(
    idle_client: TestClient, tmp_path: Path, call: Call, coding: str
) -> None:
    """RFC 9110, section 15.5.16."""
    if call.path == PROMISES[0].path:
        call = Call(call.path, {"json": {"subject": "Hello"}})
    response = call.send(idle_client, **{"Content-Encoding": coding})
    assert "Content-Encoding" in problem_of(response, 415)["detail"]
    assert response.headers["accept-encoding"] == "identity"
    assert files_below(tmp_path / "uploads") == []
    assert call.send(idle_client, **{"Content-Encoding": "Identity"}).status_code == 202


@pytest.mark.parametrize("call", [upload_of(), PROMISES[2]], ids=lambda call: call.path)
def test_a_part_of_a_body_is_not_taken_for_the_whole(idle_client: TestClient, call: Call) -> None:
    response = call.send(idle_client, **{"Content-Range": "bytes 0-4/10"})
    assert "Content-Range" in problem_of(response, 400)["detail"]


@pytest.mark.parametrize(
    ("number", "status", "advice"),
    [(errno.EROFS, 503, "writable"), (errno.ENOSPC, 507, "space"), (errno.EACCES, 503, "user")],
)
def test_the_log_says_why_an_upload_cannot_be_stored_and_the_client_is_not_told(
    idle_client: TestClient,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    status: int,
    advice: str,
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "write", refuse)
    with capture_logs() as lines:
        response = upload_of().send(idle_client)
    problem_of(response, status)
    name = errno.errorcode[number]
    (reason,) = [line["reason"] for line in lines if line["event"] == "request refused"]
    assert reason.startswith(name)
    assert advice in reason
    assert name not in response.text


# Lists.


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
    for suffix in ("", "/content", "/thumbnail"):
        problem_of(client.get(f"/uploads/{upload['id']}{suffix}"), 404)
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
