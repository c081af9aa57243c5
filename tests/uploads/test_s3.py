"""Tests of the S3 store alone: multipart uploads, lost answers, foreign objects and outages."""

import asyncio
import errno
import os
import re
import sys
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx2
import pytest

from app.uploads import s3 as module
from app.uploads.open_store import open_store
from app.uploads.store import (
    CannotOpenStore,
    NoSuchUpload,
    Store,
    StoreError,
    StoreFull,
    StoreUnavailable,
    UploadTooLarge,
)
from tests.support.s3 import SECRET, Bucket, Fault, FaultyS3
from tests.support.service import PATIENCE, ROOT, free_port
from tests.support.torture import form

pytestmark = pytest.mark.anyio

MIB = 1024 * 1024
BEGIN = "POST .*uploads"
PART = "PUT .*partNumber"
COMPLETE = "POST .*uploadId"
COPY = "PUT .*/published/"
DELETE = "POST .*delete"


@pytest.fixture
def upload_id() -> str:
    return str(uuid.uuid4())


@pytest.fixture
def store(bucket: Bucket) -> Store:
    return open_store(f"s3://{bucket.name}")


def use_small_parts_and_one_retry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use the smallest parts that S3 accepts, and only one retry, so that tests are fast."""
    monkeypatch.setattr(module, "_PART", 5 * MIB)
    monkeypatch.setattr(module, "_RETRIES", 1)


@pytest.fixture
def faulty_store(bucket: Bucket, faulty_s3: FaultyS3, monkeypatch: pytest.MonkeyPatch) -> Store:
    """The store, with the proxy `faulty_s3` in front of S3."""
    use_small_parts_and_one_retry(monkeypatch)
    return open_store(f"s3://{bucket.name}")


async def stream(megabytes: int, *, end: Exception | None = None) -> AsyncIterator[bytes]:
    for _ in range(megabytes):
        yield bytes(MIB)
    if end:
        raise end


async def until(condition: Callable[[], object]) -> None:
    """Wait until a condition holds, and fail after five seconds."""
    for _ in range(500):
        if condition():
            return
        await asyncio.sleep(0.01)
    pytest.fail("It did not happen.")


# Multipart uploads


@pytest.mark.parametrize("megabytes", [1, 7, 8, 17])
async def test_an_upload_is_stored_completely_for_any_number_of_parts(
    store: Store, bucket: Bucket, upload_id: str, megabytes: int
) -> None:
    received = await store.receive(upload_id, stream(megabytes), limit=megabytes * MIB)
    assert received.size == megabytes * MIB
    assert bucket.get(f"received/{upload_id}").content == bytes(megabytes * MIB)
    assert bucket.unfinished == []


async def test_a_small_upload_takes_a_single_request(
    faulty_store: Store, faulty_s3: FaultyS3, bucket: Bucket, upload_id: str
) -> None:
    await faulty_store.receive(upload_id, stream(1), limit=MIB)
    assert faulty_s3.requests == [f"PUT /{bucket.name}/received/{upload_id}"]


@pytest.mark.parametrize(
    ("megabytes", "limit", "end", "error"),
    [(12, 11, None, UploadTooLarge), (12, 12, EOFError(), EOFError), (1, 1, EOFError(), EOFError)],
    ids=["too large", "broken", "broken early"],
)
async def test_an_upload_that_fails_leaves_no_object_and_no_part(
    faulty_store: Store,
    faulty_s3: FaultyS3,
    bucket: Bucket,
    upload_id: str,
    megabytes: int,
    limit: int,
    end: Exception | None,
    error: type[Exception],
) -> None:
    with pytest.raises(error):
        await faulty_store.receive(upload_id, stream(megabytes, end=end), limit=limit * MIB)
    begun = any("uploads" in request for request in faulty_s3.requests)
    assert begun is (megabytes > 5)
    assert (bucket.keys, bucket.unfinished) == ([], [])


async def test_the_error_of_a_broken_upload_is_raised_although_s3_refuses_the_abort(
    faulty_store: Store, faulty_s3: FaultyS3, upload_id: str
) -> None:
    faulty_s3.faults.append(Fault("DELETE", 403))
    with pytest.raises(EOFError):
        await faulty_store.receive(upload_id, stream(12, end=EOFError()), limit=12 * MIB)
    assert faulty_s3.faults[0].begun.is_set()


@pytest.mark.parametrize("moment", [BEGIN, PART, COMPLETE, "PUT .*received/[^?]*$"])
@pytest.mark.parametrize("cancellations", [1, 5])
async def test_an_upload_cancelled_at_any_step_leaves_nothing(
    faulty_store: Store,
    faulty_s3: FaultyS3,
    bucket: Bucket,
    upload_id: str,
    moment: str,
    cancellations: int,
) -> None:
    fault = Fault(moment, held=True)
    faulty_s3.faults.append(fault)
    megabytes = 1 if "$" in moment else 12
    receiving = asyncio.create_task(
        faulty_store.receive(upload_id, stream(megabytes), limit=megabytes * MIB)
    )
    await asyncio.to_thread(fault.begun.wait, 5)
    for _ in range(cancellations):
        receiving.cancel()
        await asyncio.sleep(0.001)
    fault.go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await receiving
    # After several cancellations the request ends before its clean-up does.
    await until(lambda: any(re.match(f"DELETE|{DELETE}", line) for line in faulty_s3.requests))
    await until(lambda: (bucket.keys, bucket.unfinished) == ([], []))


@pytest.mark.parametrize(
    "trouble",
    [
        Fault(BEGIN, 403),
        Fault(PART + "=1", 403),
        Fault(PART + "=3", 403),  # the last part
        Fault(COMPLETE, 403),
        Fault(PART + "=2"),
        Fault(COMPLETE),
    ],
    ids=["begin", "part", "last part", "complete", "answer to part", "answer to complete"],
)
async def test_an_upload_that_s3_refuses_leaves_nothing_and_the_next_one_succeeds(
    faulty_store: Store, faulty_s3: FaultyS3, bucket: Bucket, upload_id: str, trouble: Fault
) -> None:
    faulty_s3.faults.append(trouble)
    with pytest.raises(StoreUnavailable):
        await faulty_store.receive(upload_id, stream(12), limit=12 * MIB)
    assert trouble.begun.is_set()
    assert (bucket.keys, bucket.unfinished) == ([], [])
    faulty_s3.faults.clear()
    await faulty_store.receive(upload_id, stream(12), limit=12 * MIB)
    assert bucket.keys == [f"received/{upload_id}"]


async def test_a_short_refusal_of_s3_is_retried(
    bucket: Bucket, faulty_s3: FaultyS3, upload_id: str
) -> None:
    store = open_store(f"s3://{bucket.name}")
    trouble = Fault("PUT", 503, "SlowDown")
    faulty_s3.faults.append(trouble)
    receiving = asyncio.create_task(store.receive(upload_id, stream(1), limit=MIB))
    await asyncio.to_thread(trouble.begun.wait, 5)
    faulty_s3.faults.clear()
    assert (await receiving).size == MIB


async def test_an_upload_does_not_block_the_event_loop(
    faulty_store: Store, faulty_s3: FaultyS3, upload_id: str
) -> None:
    part = Fault(PART, held=True)
    faulty_s3.faults.append(part)
    receiving = asyncio.create_task(faulty_store.receive(upload_id, stream(12), limit=12 * MIB))
    await until(part.begun.is_set)
    began = time.monotonic()
    await asyncio.sleep(0.05)
    assert time.monotonic() - began < PATIENCE / 2  # S3 holds the part for PATIENCE
    part.go_on.set()
    await receiving


async def test_a_large_upload_takes_little_memory(store: Store, bucket: Bucket) -> None:
    """Measured in a separate process: the peak may grow by at most 32 MB."""
    program = """if True:
        import asyncio, sys, uuid
        from pathlib import Path
        from app.uploads.open_store import open_store

        def peak():
            status = Path("/proc/self/status").read_text()
            return int(status.partition("VmHWM:")[2].split()[0]) * 1024 / 1e6

        async def content(megabytes):
            for _ in range(16 * megabytes):
                yield bytes(64 * 1024)
                await asyncio.sleep(0)

        async def main(url, megabytes):
            store = open_store(url)
            assert await store.check()
            before = peak()
            received = await store.receive(str(uuid.uuid4()), content(megabytes), limit=2**40)
            assert received.size == megabytes * 2**20
            print(peak() - before)

        asyncio.run(main(sys.argv[1], int(sys.argv[2])))
    """
    megabytes = str(form(64, 256))
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", program, f"s3://{bucket.name}", megabytes),
        cwd=ROOT,
        stdout=asyncio.subprocess.PIPE,
    )
    printed, _ = await process.communicate()
    print(f"{megabytes} MiB took {float(printed):.1f} MB")
    assert float(printed) < 32


# Keys


@pytest.mark.parametrize(
    ("url", "root"), [("", ""), ("/", ""), ("/a", "a/"), ("/a/", "a/"), ("/a/b-c.d", "a/b-c.d/")]
)
async def test_all_keys_begin_with_the_prefix(
    bucket: Bucket, upload_id: str, url: str, root: str
) -> None:
    store = open_store(f"s3://{bucket.name}{url}")
    await store.receive(upload_id, stream(1), limit=MIB)
    assert bucket.keys == [f"{root}received/{upload_id}"]
    await store.publish(upload_id)
    await store.save_thumbnail(upload_id, b"small")
    assert bucket.keys == [f"{root}published/{upload_id}", f"{root}thumbnails/{upload_id}"]
    address = await store.signed_address(upload_id, 60)
    assert address is not None
    assert httpx2.get(address).content == bytes(MIB)
    await store.delete(upload_id)
    assert bucket.keys == []


async def test_foreign_objects_in_the_bucket_are_not_removed(
    store: Store, bucket: Bucket, upload_id: str
) -> None:
    foreign = ["received/", "received/notes.txt", "received2/x", f"a/received/{upload_id}"]
    for key in foreign:
        bucket.put(key, b"theirs")
    assert await store.sweep(-1) == 0
    await store.delete(upload_id)
    assert bucket.keys == sorted(foreign)


# Publishing and downloading


@pytest.mark.parametrize("fault", [Fault(DELETE, 403), Fault(COPY)], ids=["delete", "copy"])
async def test_publishing_after_a_crash_continues_at_the_failed_step(
    faulty_store: Store, faulty_s3: FaultyS3, bucket: Bucket, upload_id: str, fault: Fault
) -> None:
    await faulty_store.receive(upload_id, stream(1), limit=MIB)
    faulty_s3.faults.append(fault)
    with pytest.raises(StoreUnavailable):
        await faulty_store.publish(upload_id)
    assert bucket.keys == [f"published/{upload_id}", f"received/{upload_id}"]
    assert await faulty_store.head(upload_id, 1) == b"\0"
    faulty_s3.faults.clear()
    await faulty_store.publish(upload_id)
    assert bucket.keys == [f"published/{upload_id}"]


async def test_a_refused_copy_leaves_the_upload_in_its_place(
    faulty_store: Store, faulty_s3: FaultyS3, bucket: Bucket, upload_id: str
) -> None:
    await faulty_store.receive(upload_id, stream(1), limit=MIB)
    faulty_s3.faults.append(Fault(COPY, 403))
    with pytest.raises(StoreUnavailable):
        await faulty_store.publish(upload_id)
    assert bucket.keys == [f"received/{upload_id}"]


@pytest.mark.parametrize(
    ("filename", "disposition"),
    [
        ('a "b".txt', "; filename=\"a _b_.txt\"; filename*=UTF-8''a%20%22b%22.txt"),
        ("\N{SNAKE}" * 255, ""),  # more than S3 keeps beside an object
    ],
)
async def test_a_signed_address_downloads_the_file_under_its_name(
    store: Store, upload_id: str, filename: str, disposition: str
) -> None:
    with pytest.raises(NoSuchUpload):
        await store.signed_address(upload_id, 300)
    await store.receive(upload_id, stream(9), limit=9 * MIB, filename=filename)  # in parts
    await store.publish(upload_id)
    address = await store.signed_address(upload_id, 300)
    assert address is not None
    assert httpx2.URL(address).params["X-Amz-Expires"] == "300"
    assert SECRET not in address
    response = httpx2.get(address)
    assert response.content == bytes(9 * MIB)
    assert response.headers["content-disposition"] == "attachment" + disposition
    assert response.headers["content-type"] == "application/octet-stream"


@pytest.mark.parametrize("error", [None, KeyError])
async def test_the_local_copy_is_deleted_after_its_use(
    store: Store, upload_id: str, error: type[Exception] | None
) -> None:
    await store.receive(upload_id, stream(3), limit=3 * MIB)
    seen: list[Path] = []

    async def use() -> None:
        async with store.as_file(upload_id) as path:
            seen.append(path)
            assert path.read_bytes() == bytes(3 * MIB)
            if error:
                raise error

    if error:
        with pytest.raises(error):
            await use()
    else:
        await use()
    assert [path.exists() for path in seen] == [False]


async def test_at_most_one_local_copy_exists_at_a_time(store: Store, upload_id: str) -> None:
    """The directory of temporary files may have room for only one."""
    await store.receive(upload_id, stream(1), limit=MIB)
    copies = most = 0

    async def use() -> None:
        nonlocal copies, most
        async with store.as_file(upload_id):
            copies += 1
            most = max(most, copies)
            await asyncio.sleep(0.01)
            copies -= 1

    await asyncio.gather(*(use() for _ in range(5)))
    assert most == 1


@pytest.mark.parametrize(
    ("number", "error"), [(errno.ENOSPC, StoreFull), (errno.EIO, StoreUnavailable)]
)
async def test_a_local_copy_that_the_disk_refuses_is_a_store_error(
    store: Store,
    upload_id: str,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    error: type[StoreError],
) -> None:
    """The next copy succeeds when there is room again."""
    await store.receive(upload_id, stream(1), limit=MIB)
    real = tempfile.NamedTemporaryFile

    def full_file() -> Any:
        file = real(buffering=0)

        def refuse(_: bytes) -> int:
            raise OSError(number, os.strerror(number))

        file.write = refuse  # type: ignore[assignment, method-assign]
        return file

    monkeypatch.setattr(tempfile, "NamedTemporaryFile", full_file)
    with pytest.raises(error) as refusal:
        async with store.as_file(upload_id):
            pass
    assert type(refusal.value) is error
    monkeypatch.setattr(tempfile, "NamedTemporaryFile", real)
    async with store.as_file(upload_id) as path:
        assert path.read_bytes() == bytes(MIB)


# Refusals by S3


@pytest.mark.parametrize(
    ("status", "code", "error"),
    [
        (400, "XMinioAdminBucketQuotaExceeded", StoreFull),
        (403, "QuotaExceeded", StoreFull),
        (403, "AccessDenied", StoreUnavailable),
        (404, "NoSuchBucket", StoreUnavailable),
        (404, "NoSuchUpload", StoreUnavailable),
    ],
)
async def test_every_refusal_is_a_store_error(
    faulty_store: Store,
    faulty_s3: FaultyS3,
    upload_id: str,
    status: int,
    code: str,
    error: type[StoreError],
) -> None:
    await faulty_store.receive(upload_id, stream(1), limit=MIB)
    faulty_s3.faults.append(Fault(".*", status, code))
    for verb in (
        faulty_store.receive(upload_id, stream(1), limit=MIB),
        faulty_store.publish(upload_id),
        faulty_store.read(upload_id, 0, 1),
        faulty_store.save_thumbnail(upload_id, b"small"),
        faulty_store.delete(upload_id),
    ):
        with pytest.raises(error) as refusal:
            await verb
        assert type(refusal.value) is error
        assert code in str(refusal.value.__cause__)
    assert not await faulty_store.check()


@pytest.mark.parametrize(
    ("status", "code", "said"),
    [(403, "Denied", "403 Forbidden (Denied)"), (404, "NoSuchKey", "404 Not Found (NoSuchKey)")],
)
async def test_a_refusal_is_described_in_one_line_without_the_body_of_the_answer(
    faulty_store: Store, faulty_s3: FaultyS3, upload_id: str, status: int, code: str, said: str
) -> None:
    """S3 repeats the headers of a request that it cannot verify, including a session token."""
    body = f"{code}</Code>\n<Token-0>{SECRET}</Token-0><Code>"
    faulty_s3.faults.append(Fault(".*", status, body))
    with pytest.raises(StoreError) as refusal:
        await faulty_store.read(upload_id, 0, 1)
    reason = str(refusal.value.__cause__)
    assert reason.endswith(said)
    assert len(reason.splitlines()) == 1
    error: BaseException | None = refusal.value
    while error is not None:
        assert SECRET not in repr(error)
        error = error.__cause__


async def test_a_missing_bucket_makes_the_store_unavailable(
    store: Store, bucket: Bucket, upload_id: str
) -> None:
    store = open_store(f"s3://{bucket.name}-2")
    assert not await store.check()
    with pytest.raises(StoreUnavailable):
        await store.receive(upload_id, stream(1), limit=MIB)


@pytest.mark.parametrize("listens", [False, True])
async def test_a_request_to_an_s3_that_does_not_answer_fails_in_time(
    bucket: Bucket,
    faulty_s3: FaultyS3,
    upload_id: str,
    monkeypatch: pytest.MonkeyPatch,
    *,
    listens: bool,
) -> None:
    if listens:
        monkeypatch.setattr(module, "_READ_TIMEOUT", timedelta(seconds=0.2))
        monkeypatch.setattr(module, "_RETRY_TIMEOUT", timedelta(seconds=0.1))
        faulty_s3.faults.append(Fault(".*", held=True))
    else:
        use_small_parts_and_one_retry(monkeypatch)
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    store = open_store(f"s3://{bucket.name}")
    began = time.monotonic()
    with pytest.raises(StoreUnavailable):
        await store.receive(upload_id, stream(1), limit=MIB)
    assert time.monotonic() - began < 9  # with the default timeouts it takes 10 s or 60 s
    for fault in faulty_s3.faults:
        fault.go_on.set()


# The check and the start


@pytest.mark.parametrize("refused", ["PUT", DELETE])
async def test_the_check_fails_if_s3_refuses_to_store_or_delete(
    faulty_store: Store, faulty_s3: FaultyS3, bucket: Bucket, refused: str
) -> None:
    faulty_s3.faults.append(Fault(refused, 403))
    assert not await faulty_store.check()
    faulty_s3.faults.clear()
    assert await faulty_store.check()
    assert bucket.keys == []


async def test_a_cancelled_check_leaves_no_object(
    faulty_store: Store, faulty_s3: FaultyS3, bucket: Bucket
) -> None:
    proof = Fault("PUT", held=True)
    faulty_s3.faults.append(proof)
    checking = asyncio.create_task(faulty_store.check())
    await asyncio.to_thread(proof.begun.wait, 5)
    checking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await checking
    proof.go_on.set()
    await until(lambda: len(faulty_s3.requests) == 2)
    await until(lambda: bucket.keys == [])


def test_without_obstore_the_error_says_what_to_install(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "app.uploads.s3")
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(CannotOpenStore, match="needs obstore: run pip install obstore"):
        open_store(f"s3://{bucket.name}")


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("AWS_ENDPOINT_URL", f"localhost:{SECRET}", "AWS_ENDPOINT_URL: must be"),
        ("AWS_ENDPOINT_URL", f"ftp://{SECRET}", "AWS_ENDPOINT_URL: must be"),
        ("AWS_SKIP_SIGNATURE", "perhaps", "UPLOAD_URL: .*perhaps"),
        ("AWS_ENDPOINT_URL", "", "AWS_ENDPOINT_URL: must be"),
        ("AWS_ACCESS_KEY_ID", None, "UPLOAD_URL: .*Missing AccessKeyId"),
    ],
)
def test_invalid_aws_variables_prevent_the_start(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch, name: str, value: str | None, said: str
) -> None:
    monkeypatch.delenv(name, raising=False)
    if value is not None:
        monkeypatch.setenv(name, value)
    with pytest.raises(CannotOpenStore, match=said) as refusal:
        open_store(f"s3://{bucket.name}")
    assert SECRET not in str(refusal.value)
