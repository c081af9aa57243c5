"""Uploads: what comes back is what was sent, whatever it is called and whatever is in it."""

import hashlib
import os
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from PIL import Image

from tests.api.requests import MAX_UPLOAD_BYTES, problem_of, upload_of
from tests.support.pictures import picture
from tests.support.service import PATIENCE, files_below, until, wait_for


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
    assert "location" not in response.headers
    until(lambda: files_below(tmp_path / "uploads") == [], within=PATIENCE)
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
    until(lambda: files_below(tmp_path / "uploads") == [], within=PATIENCE)


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
