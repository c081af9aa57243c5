"""The service with its uploads in S3, from the request to the thumbnail."""

import socket
import time
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx2
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from app.main import create_app
from app.uploads import s3
from tests.api.requests import problem_of, upload_of
from tests.support.s3 import SECRET, Bucket, Fault, FaultyS3, S3Server, credentials
from tests.support.service import PATIENCE, Service, files_below, settings_in, until, wait_for

MIB = 1024 * 1024


@pytest.fixture
def client(bucket: Bucket, tmp_path: Path) -> Iterator[TestClient]:
    """A client of a service whose uploads are in `bucket`, below "uploads"."""
    settings = settings_in(tmp_path, upload_url=f"s3://{bucket.name}/uploads")
    with TestClient(create_app(settings), follow_redirects=False) as client:
        yield client


def published(client: TestClient, content: bytes, name: str, kind: str) -> dict[str, Any]:
    queued = upload_of(content, name, kind).send(client).raise_for_status().json()
    wait_for(client, queued["id"])
    upload: dict[str, Any] = client.get(f"/uploads/{queued['upload']['id']}").json()
    return upload


def test_a_download_from_s3_returns_the_uploaded_bytes(
    client: TestClient, bucket: Bucket, tmp_path: Path
) -> None:
    content = bytes(range(256)) * 40_000  # ten megabytes, in two parts
    upload = published(client, content, "a.bin", "application/octet-stream")
    assert bucket.keys == [f"uploads/published/{upload['id']}"]
    assert bucket.unfinished == []
    address = f"/uploads/{upload['id']}/content"
    assert client.get(address).content == content
    assert client.get(address, headers={"Range": "bytes=255-256"}).content == b"\xff\0"
    assert not [name for name in files_below(tmp_path) if "uploads" in name]
    assert client.delete(f"/uploads/{upload['id']}").status_code == 204
    wait_until(lambda: bucket.keys == [])


def test_a_signed_url_downloads_the_file_from_s3_itself(client: TestClient) -> None:
    upload = published(client, b"<script>", "Übersicht.html", "text/html")
    response = client.get(f"/uploads/{upload['id']}/content?signed=true")
    assert response.status_code == 307
    signed = httpx2.URL(response.headers["location"])
    assert signed.params["X-Amz-Expires"] == "300"
    downloaded = httpx2.get(signed)
    assert downloaded.content == b"<script>"
    assert downloaded.headers["content-disposition"] == (
        "attachment; filename=\"Ubersicht.html\"; filename*=UTF-8''%C3%9Cbersicht.html"
    )
    assert downloaded.headers["content-type"] == "application/octet-stream"


def test_no_signed_url_is_given_for_a_missing_file(client: TestClient, bucket: Bucket) -> None:
    upload = published(client, b"Hello", "a.txt", "text/plain")
    assert client.portal is not None
    client.portal.call(client.app_state["uploads"].delete, upload["id"])
    problem_of(client.get(f"/uploads/{upload['id']}/content?signed=true"), 404)
    problem_of(client.get(f"/uploads/{upload['id']}/content?signed=perhaps"), 422)


def test_a_picture_gets_a_thumbnail(client: TestClient, bucket: Bucket) -> None:
    png = BytesIO()
    Image.effect_noise((600, 300), 50).save(png, "PNG")
    upload = published(client, png.getvalue(), "noise.png", "image/png")
    (task,) = client.get("/tasks?kind=make_thumbnail").json()["data"]
    wait_for(client, task["id"])
    response = client.get(f"/uploads/{upload['id']}/thumbnail")
    assert response.headers["content-type"] == "image/png"
    with Image.open(BytesIO(response.content)) as small:
        assert (small.format, small.size) == ("PNG", (256, 128))
    client.delete(f"/uploads/{upload['id']}")
    wait_until(lambda: bucket.keys == [])


# S3 is down.


def test_without_s3_the_service_is_unready_and_accepts_no_upload(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(s3, "_RETRIES", 1)
    with S3Server() as server:
        for name, value in credentials(server.url).items():
            monkeypatch.setenv(name, value)
        settings = settings_in(tmp_path, upload_url=f"s3://{server.new_bucket().name}")
        with TestClient(create_app(settings)) as client:
            assert client.get("/readyz").json()["checks"]["uploads"] == "ok"
            content = f"/uploads/{published(client, b'Hello', 'a', 'text/plain')['id']}/content"
            server.stop()
            until(lambda: client.get("/readyz").status_code == 503, within=PATIENCE)
            assert client.get("/readyz").json()["checks"]["uploads"] == "failing"
            for refused in (
                upload_of().send(client),
                client.get(content),
                client.get(f"{content}?signed=true"),
            ):
                problem_of(refused, 503)
                assert "retry-after" in refused.headers
            assert len(client.get("/uploads").json()["data"]) == 1
            assert len(client.get("/tasks").json()["data"]) == 1
    said = capfd.readouterr().err
    assert "error sending request" in said
    assert SECRET not in said


def test_an_upload_that_s3_refuses_halfway_leaves_no_trace(
    bucket: Bucket, faulty_s3: FaultyS3, tmp_path: Path
) -> None:
    faulty_s3.faults.append(Fault("PUT .*partNumber=2", 403, "AccessDenied"))
    settings = settings_in(tmp_path, upload_url=f"s3://{bucket.name}")
    with TestClient(create_app(settings)) as client:
        problem_of(upload_of(bytes(17 * MIB)).send(client), 503)
        assert client.get("/uploads").json()["data"] == []
    assert (bucket.keys, bucket.unfinished) == ([], [])


def test_an_upload_whose_client_disconnects_leaves_no_trace(
    bucket: Bucket, faulty_s3: FaultyS3, tmp_path: Path
) -> None:
    head = (
        b"POST /upload HTTP/1.1\r\nHost: x\r\nContent-Length: 30000000\r\n"
        b"Content-Type: multipart/form-data; boundary=b\r\n\r\n"
        b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.bin"\r\n\r\n'
    )
    environment = credentials(faulty_s3.url)
    with Service(tmp_path, upload_url=f"s3://{bucket.name}", **environment) as service:
        with socket.create_connection(("127.0.0.1", service.port)) as connection:
            connection.sendall(head + bytes(17 * MIB))
            wait_until(lambda: bucket.unfinished != [])
        wait_until(lambda: bucket.unfinished == [])
        assert bucket.keys == []
        assert service.log.count('"level":"error"') == 0


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
