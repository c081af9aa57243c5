"""Downloads from both stores: whole files, ranges, and conditional requests."""

import hashlib
import os
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient

from app.main import create_app
from app.uploads.store import StoreUnavailable
from tests.api.requests import problem_of, upload_of
from tests.support.s3 import S3Server, credentials
from tests.support.service import settings_in, wait_for

LETTERS = b"abcdefghij"
TAG = f'"{hashlib.sha256(LETTERS).hexdigest()}"'
MIB = 1024 * 1024


@pytest.fixture(scope="module", params=["file", pytest.param("s3", marks=pytest.mark.thorough)])
def client(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[TestClient]:
    """A client of a service, with each store in turn."""
    directory = tmp_path_factory.mktemp("downloads")
    upload_url = f"file:{directory}/uploads"
    with pytest.MonkeyPatch.context() as environment:
        if request.param == "s3":
            server: S3Server = request.getfixturevalue("s3_server")
            upload_url = f"s3://{server.new_bucket().name}"
            for name, value in credentials(server.url).items():
                environment.setenv(name, value)
        settings = settings_in(directory, upload_url=upload_url)
        with TestClient(create_app(settings), follow_redirects=False) as client:
            yield client


@pytest.fixture(scope="module")
def content(client: TestClient) -> str:
    """The address of a published file with ten letters."""
    return published(client, LETTERS)


def published(
    client: TestClient, content: bytes, name: str = "letters.txt", kind: str = "text/plain"
) -> str:
    """Upload a file, wait until it is published, and return the address of its bytes."""
    queued: dict[str, Any] = upload_of(content, name, kind).send(client).json()
    wait_for(client, queued["id"])
    return f"/uploads/{queued['upload']['id']}/content"


def test_a_whole_download_has_the_headers_of_its_file(client: TestClient, content: str) -> None:
    response = client.get(content)
    assert (response.status_code, response.content) == (200, LETTERS)
    assert response.headers["content-length"] == "10"
    assert response.headers["accept-ranges"] == "bytes"
    assert response.headers["etag"] == TAG
    assert response.headers["content-type"] == "text/plain"
    assert response.headers["content-disposition"] == (
        "attachment; filename=\"letters.txt\"; filename*=UTF-8''letters.txt"
    )
    assert response.headers["content-security-policy"] == "sandbox"
    assert response.headers["x-content-type-options"] == "nosniff"
    assert "content-range" not in response.headers


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        ("text/plain", "naïve".encode()),
        ("text/csv; charset=windows-1252", b"na\xefve;\x80"),
        ("text/html; charset=utf-8", "<!DOCTYPE html>naïve".encode()),
        ("text/plain", "naïve".encode("utf-16")),
        ("text/plain; charset=UTF-16BE", "naïve".encode("utf-16-be")),
        ("application/json", b"{}"),
    ],
)
def test_a_text_keeps_the_charset_of_its_upload_or_has_none(
    client: TestClient, kind: str, content: bytes
) -> None:
    address = published(client, content, kind=kind)
    for headers in ({}, {"Range": "bytes=0-0"}):
        assert client.get(address, headers=headers).headers["content-type"] == kind
    assert client.get(address.removesuffix("/content")).json()["content_type"] == kind


@pytest.mark.parametrize(
    ("name", "disposition"),
    [
        (
            "naïve café.txt",
            "filename=\"naive cafe.txt\"; filename*=UTF-8''na%C3%AFve%20caf%C3%A9.txt",
        ),
        ("名.txt", "filename=\"upload.txt\"; filename*=UTF-8''%E5%90%8D.txt"),
        ("a;b=c.txt", "filename=\"a;b=c.txt\"; filename*=UTF-8''a%3Bb%3Dc.txt"),
        ("100%25.txt", "filename=\"100_25.txt\"; filename*=UTF-8''100%2525.txt"),
    ],
)
def test_a_download_has_its_exact_name_and_an_ascii_form_of_it(
    client: TestClient, name: str, disposition: str
) -> None:
    response = client.get(published(client, LETTERS, name))
    assert response.headers["content-disposition"] == f"attachment; {disposition}"


@pytest.mark.parametrize(
    ("wanted", "start", "end"),
    [
        ("bytes=0-0", 0, 1),
        ("bytes=2-4", 2, 5),
        ("bytes=7-", 7, 10),
        ("bytes=-3", 7, 10),
        ("bytes=0-9", 0, 10),
        ("bytes=9-9", 9, 10),
        ("bytes=5-1000", 5, 10),
        ("bytes=-1000", 0, 10),
        ("bytes=9-18446744073709551616", 9, 10),
        ("Bytes=1-2", 1, 3),
    ],
)
def test_a_range_is_answered_with_exactly_its_bytes(
    client: TestClient, content: str, wanted: str, start: int, end: int
) -> None:
    response = client.get(content, headers={"Range": wanted})
    assert (response.status_code, response.content) == (206, LETTERS[start:end])
    assert response.headers["content-range"] == f"bytes {start}-{end - 1}/10"
    assert response.headers["content-length"] == str(end - start)
    assert response.headers["etag"] == TAG
    assert response.headers["content-disposition"].startswith("attachment")
    assert response.headers["content-security-policy"] == "sandbox"


@pytest.mark.parametrize(
    "wanted",
    [
        "",
        "bytes",
        "bytes=",
        "bytes=-",
        "bytes=4-2",
        "bytes=a-b",
        "bytes=1-2,4-5",
        "bytes=0x1-2",
        "bytes=-1-2",
        "bytes=\u0661-",
        "bytes=0-" + "9" * 5000,
        "lines=1-2",
    ],
)
def test_an_invalid_or_multiple_range_is_answered_with_the_whole_file(
    client: TestClient, content: str, wanted: str
) -> None:
    response = client.get(content, headers={b"Range": wanted.encode()})
    assert (response.status_code, response.content) == (200, LETTERS)
    assert "content-range" not in response.headers


@pytest.mark.parametrize("wanted", ["bytes=10-", "bytes=10-10", "bytes=1000-2000", "bytes=-0"])
def test_a_range_after_the_end_is_refused(client: TestClient, content: str, wanted: str) -> None:
    response = client.get(content, headers={"Range": wanted})
    problem_of(response, 416)
    assert response.headers["content-range"] == "bytes */10"


def test_every_range_of_an_empty_upload_is_refused(client: TestClient) -> None:
    content = published(client, b"")
    response = client.get(content)
    assert (response.status_code, response.content) == (200, b"")
    assert response.headers["content-length"] == "0"
    problem_of(client.get(content, headers={"Range": "bytes=0-"}), 416)


@pytest.mark.parametrize(
    ("tags", "status"),
    [
        (TAG, 304),
        (f"W/{TAG}", 304),
        (f'"other", {TAG}', 304),
        ("*", 304),
        ('"other"', 200),
        (TAG.strip('"'), 200),
        ("", 200),
    ],
)
def test_a_file_that_the_client_has_is_not_sent_again(
    client: TestClient, content: str, tags: str, status: int
) -> None:
    """A range does not matter in this case (RFC 9110, section 13.2.2)."""
    response = client.get(content, headers={"If-None-Match": tags})
    assert (response.status_code, response.content) == (status, LETTERS if status == 200 else b"")
    assert response.headers["etag"] == TAG
    if status == 304:
        range_too = {"If-None-Match": tags, "Range": "bytes=99-"}
        assert client.get(content, headers=range_too).status_code == 304


@pytest.mark.parametrize(
    ("tag", "status"),
    [
        (TAG, 206),
        (f"W/{TAG}", 200),
        ('"other"', 200),
        ("Sat, 21 Nov 2026 09:52:01 GMT", 200),
    ],
)
def test_a_range_with_an_outdated_etag_is_answered_with_the_whole_file(
    client: TestClient, content: str, tag: str, status: int
) -> None:
    response = client.get(content, headers={"If-Range": tag, "Range": "bytes=7-"})
    assert (response.status_code, response.content) == (
        (206, b"hij") if status == 206 else (200, LETTERS)
    )


def test_a_large_download_comes_in_pieces(client: TestClient) -> None:
    data = os.urandom(3 * MIB + 1)
    content = published(client, data)
    assert client.get(content).content == data
    across = {"Range": f"bytes={MIB - 5}-{3 * MIB}"}
    assert client.get(content, headers=across).content == data[MIB - 5 : 3 * MIB + 1]


# Errors before the response begins.


def test_a_file_that_is_gone_is_answered_404(client: TestClient) -> None:
    content = published(client, LETTERS)
    upload_id = content.split("/")[2]
    assert client.portal is not None
    client.portal.call(client.app_state["uploads"].delete, upload_id)
    problem_of(client.get(content), 404)
    problem_of(client.get(content, headers={"Range": "bytes=1-2"}), 404)


def test_a_store_that_cannot_read_is_answered_503(
    client: TestClient, content: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(*_: object) -> bytes:
        raise StoreUnavailable

    monkeypatch.setattr(client.app_state["uploads"], "read", refuse)
    response = client.get(content)
    problem_of(response, 503)
    assert "retry-after" in response.headers
    assert "etag" not in response.headers


def test_the_documentation_names_every_status_of_a_download(client: TestClient) -> None:
    document = client.get("/openapi.json").json()
    responses = document["paths"]["/uploads/{upload_id}/content"]["get"]["responses"]
    assert {"200", "206", "304", "307", "404", "409", "416", "422", "503"} <= set(responses)
    assert "*/*" in responses["200"]["content"]  # a picture has its own media type
