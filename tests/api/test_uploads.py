"""Uploads: a download returns the uploaded bytes; a refused or deleted upload leaves no trace."""

import base64
import errno
import hashlib
import os
import time
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from PIL import Image
from structlog.testing import capture_logs

from afterward.errors import CommitUnknown, QueueUnavailable
from afterward.task import Record, Writes, new_id
from app.tasks import pending_uploads as pending
from app.tasks.uploads import COLLECTION
from app.uploads.local import LocalStore
from app.uploads.store import Received, StoreUnavailable
from tests.api.requests import MAX_UPLOAD_BYTES, PROMISES, Call, problem_of, upload_of
from tests.support.forms import FORM, form_of, part
from tests.support.pictures import picture
from tests.support.service import PATIENCE, files_below, until, wait_for

HEAD = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'


def published(
    client: TestClient, content: bytes, name: str = "a.bin", kind: str = "application/octet-stream"
) -> dict[str, Any]:
    """Upload a file, wait until it is published, and return its representation."""
    queued = upload_of(content, name, kind).send(client).raise_for_status().json()
    wait_for(client, queued["id"])
    upload: dict[str, Any] = client.get(f"/uploads/{queued['upload']['id']}").json()
    return upload


# Uploads and their downloads.


@pytest.mark.parametrize("size", [0, 1, 65_535, 65_537, MAX_UPLOAD_BYTES])
def test_a_download_returns_the_uploaded_bytes(client: TestClient, size: int) -> None:
    content = os.urandom(size)
    upload = published(client, content)
    assert (upload["size"], upload["sha256"]) == (size, hashlib.sha256(content).hexdigest())
    assert client.get(f"/uploads/{upload['id']}/content").content == content


def test_the_bytes_are_in_the_store_before_the_response(
    idle_client: TestClient, tmp_path: Path
) -> None:
    upload = upload_of(b"Hello").send(idle_client).json()["upload"]
    (file,) = files_below(tmp_path / "uploads")
    assert (tmp_path / "uploads" / file).read_bytes() == b"Hello"
    assert idle_client.get(f"/uploads/{upload['id']}").json()["status"] == "received"
    problem_of(idle_client.get(f"/uploads/{upload['id']}/content"), 409)


def test_the_headers_of_a_download_make_a_browser_save_it_and_not_show_it(
    client: TestClient,
) -> None:
    upload = published(client, b"<script>alert(1)</script>", "page.html", "text/html")
    headers = client.get(f"/uploads/{upload['id']}/content").headers
    assert headers["content-disposition"].startswith("attachment;")
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["content-security-policy"] == "sandbox"


def test_a_download_can_be_continued(client: TestClient) -> None:
    upload = published(client, b"0123456789")
    rest = client.get(f"/uploads/{upload['id']}/content", headers={"Range": "bytes=7-"})
    assert (rest.status_code, rest.content) == (206, b"789")


# Files in a transfer encoding, and compressed bodies.


def encoded(content: bytes, *headers: bytes) -> Call:
    """Make an upload whose part has these headers."""
    body = form_of(part(b'name="file"; filename="a.bin"', *headers, content=content))
    return Call("/upload", {"content": body, "headers": FORM})


@pytest.mark.parametrize("encoding", ["base64", "quoted-printable", "binary"])
def test_a_file_in_a_transfer_encoding_is_stored_decoded(client: TestClient, encoding: str) -> None:
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


def test_the_size_limit_counts_the_decoded_bytes(client: TestClient) -> None:
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
def test_a_file_that_cannot_be_decoded_is_refused_and_not_kept(
    idle_client: TestClient, tmp_path: Path, header: bytes, content: bytes, status: int
) -> None:
    response = encoded(content, header).send(idle_client)
    assert response.status_code == status
    assert len(files_below(tmp_path / "uploads")) == (status == 202)


@pytest.mark.parametrize(
    "call", [upload_of(), PROMISES[0], PROMISES[2]], ids=lambda call: call.path
)
@pytest.mark.parametrize("coding", ["gzip", "br", "deflate", "identity, GZIP", "aes128gcm"])
def test_the_refusal_of_a_compressed_body_names_the_accepted_encoding(
    idle_client: TestClient, tmp_path: Path, call: Call, coding: str
) -> None:
    """See RFC 9110, section 15.5.16."""
    if call.path == PROMISES[0].path:
        call = Call(call.path, {"json": {"subject": "Hello"}})
    response = call.send(idle_client, **{"Content-Encoding": coding})
    assert "Content-Encoding" in problem_of(response, 415)["detail"]
    assert response.headers["accept-encoding"] == "identity"
    assert files_below(tmp_path / "uploads") == []
    assert call.send(idle_client, **{"Content-Encoding": "Identity"}).status_code == 202


@pytest.mark.parametrize("call", [upload_of(), PROMISES[2]], ids=lambda call: call.path)
def test_a_request_with_content_range_is_refused(idle_client: TestClient, call: Call) -> None:
    response = call.send(idle_client, **{"Content-Range": "bytes 0-4/10"})
    assert "Content-Range" in problem_of(response, 400)["detail"]


@pytest.mark.parametrize(
    ("number", "status", "advice"),
    [(errno.EROFS, 503, "writable"), (errno.ENOSPC, 507, "space"), (errno.EACCES, 503, "user")],
)
def test_the_reason_of_a_storage_error_is_in_the_log_and_not_in_the_response(
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
    assert "location" not in response.headers
    until(lambda: files_below(tmp_path / "uploads") == [], within=PATIENCE)
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
    until(lambda: files_below(tmp_path / "uploads") == [], within=PATIENCE)


# Pictures.


def thumbnail_task(client: TestClient, status: str) -> dict[str, Any]:
    (task,) = client.get("/tasks?kind=make_thumbnail").json()["data"]
    return wait_for(client, task["id"], status)


def test_a_picture_gets_a_thumbnail(client: TestClient) -> None:
    upload = published(client, picture(), "noise.png", "image/png")
    assert upload["content_type"] == "image/png"
    thumbnail_task(client, "succeeded")
    response = client.get(f"/uploads/{upload['id']}/thumbnail")
    assert response.headers["content-type"] == "image/png"
    assert response.headers["x-content-type-options"] == "nosniff"
    with Image.open(BytesIO(response.content)) as small:
        assert (small.format, small.size) == ("PNG", (256, 128))


def test_an_upload_without_a_thumbnail_is_not_reported_as_missing(idle_client: TestClient) -> None:
    upload = upload_of().send(idle_client).json()["upload"]
    missing = problem_of(idle_client.get(f"/uploads/{upload['id']}/thumbnail"), 404)
    assert missing["detail"] == "This upload has no thumbnail, or not yet."
    unknown = problem_of(idle_client.get("/uploads/unknown/thumbnail"), 404)
    assert unknown["detail"] == "There is no such upload."


# Damaged records.


def damaged(client: TestClient, body: object, created_at: float | None = None) -> str:
    """Write a record of an upload with this body and time, and return its id."""
    assert client.portal is not None
    engine = client.app_state["queue"].engine
    at = time.time() if created_at is None else created_at
    record = Record(COLLECTION, "", new_id(time.time()), body, at)  # type: ignore[arg-type]
    client.portal.call(engine.put, Writes(records=(record,)))
    return record.id


@pytest.mark.parametrize(
    ("body", "shown"),
    [
        ({"status": "published"}, {"status": "published"}),
        ({"status": "published", "size": "5", "filename": "a"}, {"filename": "a"}),
        ({"size": 5, "unknown": 1}, {"size": 5}),
        ([], {}),
        (None, {}),
    ],
    ids=["fields missing", "another type", "too many fields", "a list", "null"],
)
def test_a_damaged_record_is_shown_with_its_readable_fields(
    client: TestClient, body: object, shown: dict[str, object]
) -> None:
    """It does not hide the other uploads of the list."""
    whole = published(client, b"Hello")
    upload_id = damaged(client, body)
    listed = client.get("/uploads")
    assert listed.status_code == 200
    assert [upload["id"] for upload in listed.json()["data"]] == [upload_id, whole["id"]]
    upload = client.get(f"/uploads/{upload_id}").json()
    assert upload.items() >= {"id": upload_id, **shown}.items()
    assert upload["sha256"] is None
    problem_of(client.get(f"/uploads/{upload_id}/content"), 409)


@pytest.mark.parametrize("page", ["/uploads", "/board/uploads"])
def test_a_record_with_a_damaged_time_does_not_hide_the_others(
    client: TestClient, page: str
) -> None:
    whole = published(client, b"Hello")
    upload_id = damaged(client, {"status": "published"}, 1e300)
    listed = client.get(page).raise_for_status().text
    assert whole["id"] in listed
    assert upload_id in listed


# Deleting.


def test_the_removal_of_the_bytes_is_retried_until_the_store_succeeds(
    client: TestClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The response does not depend on the store, because the removal is a durable task."""
    upload = published(client, b"private")
    real, refusals = LocalStore.delete, iter([StoreUnavailable(), StoreUnavailable()])

    async def reluctant(store: LocalStore, upload_id: str) -> None:
        for refusal in refusals:
            raise refusal
        await real(store, upload_id)

    monkeypatch.setattr(LocalStore, "delete", reluctant)
    assert client.delete(f"/uploads/{upload['id']}").status_code == 204
    problem_of(client.delete(f"/uploads/{upload['id']}"), 404)
    until(lambda: files_below(tmp_path / "uploads") == [], within=PATIENCE)
    (task,) = client.get("/tasks?kind=remove_upload").json()["data"]
    assert wait_for(client, task["id"])["attempts"] == 3


def test_a_deletion_that_cannot_be_committed_is_refused(
    client: TestClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload = published(client, b"Hello")

    async def refuse(_: Writes) -> None:
        raise QueueUnavailable

    with monkeypatch.context() as refusing:
        refusing.setattr(client.app_state["queue"].engine, "put", refuse)
        problem_of(client.delete(f"/uploads/{upload['id']}"), 503)
    assert client.get(f"/uploads/{upload['id']}/content").content == b"Hello"
    assert client.get("/tasks?kind=remove_upload").json()["data"] == []


# A refused upload leaves no file in the store and no record in the database.


def pending_uploads(client: TestClient) -> list[Record]:
    assert client.portal is not None
    list_records = client.app_state["queue"].engine.list_records
    found: list[Record] = client.portal.call(
        partial(list_records, pending.COLLECTION, client="", after=None, limit=9)
    )
    return found


@pytest.mark.parametrize(
    ("content", "content_type", "status"),
    [
        (b"--x", "text/plain", 415),
        (b"--x", "multipart/form-data; boundary=x", 400),
        (HEAD + b"never ends", "multipart/form-data; boundary=x", 400),
        (
            HEAD + b"a" * (MAX_UPLOAD_BYTES + 1) + b"\r\n--x--\r\n",
            "multipart/form-data; boundary=x",
            413,
        ),
        (
            HEAD + b"a\r\n--x\r\n" + HEAD[5:] + b"b\r\n--x--\r\n",
            "multipart/form-data; boundary=x",
            422,
        ),
    ],
    ids=["no form", "nothing in it", "cut short", "too large", "two files"],
)
def test_a_refused_upload_leaves_no_file_and_no_record(
    client: TestClient, tmp_path: Path, content: bytes, content_type: str, status: int
) -> None:
    response = client.post("/upload", content=content, headers={"Content-Type": content_type})
    problem_of(response, status)
    assert files_below(tmp_path / "uploads") == []
    assert pending_uploads(client) == []


@pytest.mark.parametrize(("error", "left"), [(QueueUnavailable(), 0), (CommitUnknown(), 1)])
def test_a_file_stays_only_if_its_upload_may_be_committed(
    client: TestClient,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: QueueUnavailable,
    left: int,
) -> None:
    engine = client.app_state["queue"].engine
    put = engine.put

    async def refuse(writes: Writes) -> None:
        if writes.tasks:  # the first put of an upload has only a record
            raise error
        await put(writes)

    monkeypatch.setattr(engine, "put", refuse)
    problem_of(upload_of().send(client), 503)
    assert len(files_below(tmp_path / "uploads")) == left
    assert len(pending_uploads(client)) == left


def test_a_repeated_upload_leaves_one_file(client: TestClient, tmp_path: Path) -> None:
    """The second file is removed at once, because it is certain that it was not committed."""
    first, second = (upload_of().send(client, **{"Idempotency-Key": "k"}) for _ in range(2))
    assert second.headers["idempotency-replay"] == "true"
    assert first.json() == second.json()
    wait_for(client, first.json()["id"])
    assert files_below(tmp_path / "uploads") == [f"published/{first.json()['upload']['id']}"]
    assert pending_uploads(client) == []


def test_a_failed_removal_of_a_repeated_file_does_not_change_the_response(
    client: TestClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pending record stays, so the clean-up removes the file later."""

    async def refuse(*_: object) -> None:
        raise StoreUnavailable

    upload_of().send(client, **{"Idempotency-Key": "k"})
    monkeypatch.setattr(LocalStore, "delete", refuse)
    again = upload_of().send(client, **{"Idempotency-Key": "k"})
    assert again.headers["idempotency-replay"] == "true"
    (left,) = pending_uploads(client)
    assert any(left.id in file for file in files_below(tmp_path / "uploads"))


def test_an_upload_that_was_given_up_is_refused(
    client: TestClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clean-up of a different process gives it up when its heartbeats stop for too long."""
    store, engine = client.app_state["uploads"], client.app_state["queue"].engine
    receive = store.receive

    async def given_up_meanwhile(upload_id: str, *arguments: Any, **options: Any) -> Received:
        received: Received = await receive(upload_id, *arguments, **options)
        assert await engine.delete_record(Record(pending.COLLECTION, "", upload_id, {}, 0))
        return received

    monkeypatch.setattr(store, "receive", given_up_meanwhile)
    problem = problem_of(upload_of().send(client), 503)
    assert "gave up" in problem["detail"]
    assert client.get("/uploads").json()["data"] == []
    assert files_below(tmp_path / "uploads") == []


def test_the_file_of_a_committed_upload_stays_even_if_the_commit_reports_an_error(
    client: TestClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine that repeats a commit may find that its first try has removed a record already."""
    engine = client.app_state["queue"].engine
    put = engine.put

    async def twice(writes: Writes) -> None:
        await put(writes)
        if writes.removed:
            await put(writes)

    monkeypatch.setattr(engine, "put", twice)
    problem_of(upload_of().send(client), 503)
    (upload,) = client.get("/uploads").json()["data"]
    assert [Path(file).name for file in files_below(tmp_path / "uploads")] == [upload["id"]]
