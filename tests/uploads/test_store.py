"""Tests of every upload store, then of the local store alone."""

import asyncio
import errno
import fcntl
import hashlib
import os
import re
import stat
import threading
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from app.uploads.local import LocalStore, _warn_that_names_are_not_synced
from app.uploads.open_store import open_store
from app.uploads.store import (
    NoSuchUpload,
    Received,
    Store,
    StoreFull,
    StoreUnavailable,
    UploadTooLarge,
    checked_id,
    reason_of,
)
from tests.support.s3 import Bucket

pytestmark = pytest.mark.anyio

MIB = 1024 * 1024


@pytest.fixture(params=["file", pytest.param("s3", marks=pytest.mark.thorough)])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """A local store and an S3 store, in turn."""
    if request.param == "file":
        return open_store(f"file:{tmp_path}/var/uploads")
    bucket: Bucket = request.getfixturevalue("bucket")
    return open_store(f"s3://{bucket.name}/var/uploads")


@pytest.fixture
def upload_id() -> str:
    return str(uuid.uuid4())


async def stream(*chunks: bytes) -> AsyncIterator[bytes]:
    for chunk in chunks:
        yield chunk


def readers_of(store: Store) -> list[Callable[[str], Awaitable[object]]]:
    """Return each method that raises NoSuchUpload for an unknown upload."""
    return [
        store.head,
        store.publish,
        store.thumbnail,
        lambda upload_id: store.read(upload_id, 0, 1),
        lambda upload_id: store.read(upload_id, 0, 0),
    ]


# Every store


@pytest.mark.parametrize("size", [0, 1, MIB - 1, MIB, MIB + 1, 9 * MIB + 7])
async def test_an_upload_is_stored_unchanged(store: Store, upload_id: str, size: int) -> None:
    data = os.urandom(size)
    chunks = [data[i : i + 65_537] for i in range(0, size, 65_537)]
    received = await store.receive(upload_id, stream(*chunks), limit=size)
    assert received == Received(size, hashlib.sha256(data).hexdigest())
    async with store.as_file(upload_id) as path:
        assert path.read_bytes() == data
    assert not path.exists() or isinstance(store, LocalStore)
    assert await store.head(upload_id, 10) == data[:10]


async def test_an_upload_can_be_downloaded_after_it_is_published(
    store: Store, upload_id: str
) -> None:
    await store.receive(upload_id, stream(b"Hello"), limit=5)
    with pytest.raises(NoSuchUpload):
        await store.read(upload_id, 0, 5)
    await store.publish(upload_id)
    assert await store.read(upload_id, 0, 5) == b"Hello"
    assert await store.head(upload_id) == b"Hello"
    async with store.as_file(upload_id) as path:
        assert path.read_bytes() == b"Hello"


async def test_any_range_of_an_upload_can_be_read(store: Store, upload_id: str) -> None:
    data = os.urandom(9 * MIB)
    await store.receive(upload_id, stream(data), limit=len(data))
    await store.publish(upload_id)
    for start, end in [(0, 1), (MIB - 1, MIB + 1), (8 * MIB, 9 * MIB), (5, 5)]:
        assert await store.read(upload_id, start, end) == data[start:end]


async def test_an_empty_upload_is_stored(store: Store, upload_id: str) -> None:
    await store.receive(upload_id, stream(), limit=0)
    assert await store.head(upload_id) == b""
    await store.publish(upload_id)
    assert await store.read(upload_id, 0, 0) == b""


async def test_publishing_again_after_a_crash_succeeds(store: Store, upload_id: str) -> None:
    await store.receive(upload_id, stream(b"Hello"), limit=5)
    await store.publish(upload_id)
    await store.publish(upload_id)
    assert await store.read(upload_id, 0, 5) == b"Hello"


async def test_one_byte_over_the_limit_is_too_large(store: Store, upload_id: str) -> None:
    with pytest.raises(UploadTooLarge, match="larger than this service takes"):
        await store.receive(upload_id, stream(b"Hello", b"!"), limit=5)
    with pytest.raises(NoSuchUpload):
        await store.head(upload_id)


async def test_a_broken_stream_leaves_nothing(store: Store, upload_id: str) -> None:
    async def broken() -> AsyncIterator[bytes]:
        yield bytes(9 * MIB)
        raise EOFError

    with pytest.raises(EOFError):
        await store.receive(upload_id, broken(), limit=10 * MIB)
    with pytest.raises(NoSuchUpload):
        await store.head(upload_id)
    assert await store.sweep(-1) == 0


async def test_an_unknown_upload_raises_no_such_upload(store: Store, upload_id: str) -> None:
    for verb in readers_of(store):
        with pytest.raises(NoSuchUpload):
            await verb(upload_id)
    with pytest.raises(NoSuchUpload):
        async with store.as_file(upload_id):
            pass


async def test_a_later_thumbnail_replaces_the_first(store: Store, upload_id: str) -> None:
    await store.save_thumbnail(upload_id, b"first")
    await store.save_thumbnail(upload_id, b"second")
    assert await store.thumbnail(upload_id) == b"second"


@pytest.mark.parametrize("published", [False, True])
async def test_a_deleted_upload_raises_no_such_upload_in_every_state(
    store: Store, upload_id: str, *, published: bool
) -> None:
    await store.receive(upload_id, stream(b"Hello"), limit=5)
    await store.save_thumbnail(upload_id, b"small")
    if published:
        await store.publish(upload_id)
    await store.delete(upload_id)
    await store.delete(upload_id)
    for verb in readers_of(store):
        with pytest.raises(NoSuchUpload):
            await verb(upload_id)


async def test_the_check_of_a_working_store_succeeds_and_leaves_nothing(store: Store) -> None:
    assert await store.check()
    assert await store.sweep(-1) == 0


@pytest.mark.parametrize(
    "wrong",
    [
        "",
        "..",
        "../../etc/passwd",
        "a/b",
        "\0",
        "D5D8DBE5-C3D4-4CF8-9FAB-1954E852F96A",
        "0" * 32,
        "0\n",
    ],
)
async def test_an_invalid_id_raises_no_such_upload(store: Store, wrong: str) -> None:
    with pytest.raises(NoSuchUpload):
        checked_id(wrong)
    with pytest.raises(NoSuchUpload):
        await store.receive(wrong, stream(), limit=5)
    with pytest.raises(NoSuchUpload):
        await store.save_thumbnail(wrong, b"small")
    with pytest.raises(NoSuchUpload):
        await store.signed_address(wrong, 60)
    for verb in (*readers_of(store), store.delete):
        with pytest.raises(NoSuchUpload):
            await verb(wrong)


# The local store


@pytest.fixture
def local(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "up")


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir())


def test_a_relative_url_is_a_directory_below_the_current_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    store = open_store("file:var/uploads")
    monkeypatch.chdir("/")
    assert asyncio.run(store.check())
    assert (tmp_path / "var" / "uploads" / "received").is_dir()


@pytest.mark.parametrize("slashes", ["", "//"])
def test_an_absolute_url_may_have_one_slash_or_three(tmp_path: Path, slashes: str) -> None:
    assert asyncio.run(open_store(f"file:{slashes}{tmp_path}/up").check())
    assert (tmp_path / "up" / "received").is_dir()


@pytest.mark.parametrize(
    "url", ["", "uploads", "ftp://host/path", "file:", "file://host/path", "s3:", "s3:///a", "s3:a"]
)
def test_an_invalid_url_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="file:"):
        open_store(url)


async def test_only_the_services_user_can_read_uploads(
    local: LocalStore, tmp_path: Path, upload_id: str
) -> None:
    await local.receive(upload_id, stream(b"Hello"), limit=5)
    await local.publish(upload_id)
    assert modes(tmp_path) == {(True, 0o700), (False, 0o600)}


def modes(folder: Path) -> set[tuple[bool, int]]:
    return {(path.is_dir(), stat.S_IMODE(path.stat().st_mode)) for path in folder.rglob("*")}


async def until(condition: Callable[[], object]) -> None:
    """Wait until a condition holds, and fail after five seconds."""
    for _ in range(500):
        if condition():
            return
        await asyncio.sleep(0.01)
    pytest.fail("It did not happen.")


@pytest.mark.parametrize("step", ["open", "write", "keep"])
@pytest.mark.parametrize("cancellations", [1, 5])
async def test_an_upload_cancelled_at_any_step_leaves_nothing(
    local: LocalStore,
    tmp_path: Path,
    upload_id: str,
    monkeypatch: pytest.MonkeyPatch,
    step: str,
    cancellations: int,
) -> None:
    blocked, go_on = threading.Event(), threading.Event()
    name = {"open": "open", "write": "write", "keep": "fsync"}[step]
    real: Callable[..., int] = getattr(os, name)

    def slow(*args: object) -> int:
        blocked.set()
        go_on.wait(5)
        return real(*args)

    await local.check()
    monkeypatch.setattr(os, name, slow)
    receiving = asyncio.create_task(
        local.receive(upload_id, stream(bytes(MIB), bytes(MIB)), limit=2 * MIB)
    )
    await asyncio.to_thread(blocked.wait, 5)
    for _ in range(cancellations):
        receiving.cancel()
        await asyncio.sleep(0.001)
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await receiving
    # After several cancellations the request ends before its clean-up does.
    await until(lambda: not files(tmp_path))


async def test_a_broken_stream_on_a_full_disk_leaves_nothing(
    local: LocalStore, tmp_path: Path, upload_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "write", failing_with(errno.ENOSPC))

    async def broken() -> AsyncIterator[bytes]:
        yield bytes(MIB)
        raise EOFError

    with pytest.raises(EOFError):
        await local.receive(upload_id, broken(), limit=MIB)
    assert files(tmp_path) == []


async def test_an_upload_that_fails_leaves_no_file_open(local: LocalStore, upload_id: str) -> None:
    before = open_files()
    for _ in range(3):
        with pytest.raises(UploadTooLarge):
            await local.receive(upload_id, stream(b"Hello", b"!"), limit=5)
    assert open_files() == before


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def failing_with(number: int) -> Callable[..., int]:
    def refuse(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    return refuse


@pytest.mark.parametrize("call", ["open", "write", "fsync"])
@pytest.mark.parametrize(
    ("number", "error"),
    [
        (errno.ENOSPC, StoreFull),
        (errno.EDQUOT, StoreFull),
        (errno.EROFS, StoreUnavailable),
        (errno.EIO, StoreUnavailable),
    ],
)
async def test_an_upload_that_the_disk_refuses_leaves_nothing_and_the_next_one_succeeds(
    local: LocalStore,
    tmp_path: Path,
    upload_id: str,
    monkeypatch: pytest.MonkeyPatch,
    call: str,
    number: int,
    error: type[Exception],
) -> None:
    await local.check()
    with monkeypatch.context() as broken:
        broken.setattr(os, call, failing_with(number))
        with pytest.raises(error):
            await local.receive(upload_id, stream(bytes(3 * MIB)), limit=3 * MIB)
        with pytest.raises(error):
            await local.save_thumbnail(upload_id, b"small")
    assert files(tmp_path) == []
    await local.receive(upload_id, stream(b"Hello"), limit=5)
    assert await local.head(upload_id) == b"Hello"


async def test_a_short_write_is_continued(
    local: LocalStore, upload_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, data[:1000]))
    data = os.urandom(10_001)
    await local.receive(upload_id, stream(data), limit=10_001)
    assert await local.head(upload_id, 20_000) == data


async def test_a_store_with_a_file_in_place_of_its_directory_is_unavailable(
    tmp_path: Path, upload_id: str
) -> None:
    (tmp_path / "file").touch()
    store = LocalStore(tmp_path / "file")
    assert not await store.check()
    with pytest.raises(StoreUnavailable):
        await store.receive(upload_id, stream(b"Hello"), limit=5)


async def test_files_and_their_directories_are_synced_in_order(
    local: LocalStore, tmp_path: Path, upload_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    await local.check()
    synced: list[str] = []
    real = os.fsync

    def noted(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        synced.append(path.relative_to(tmp_path / "up").parts[0] + "/" * path.is_file())
        real(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    await local.receive(upload_id, stream(b"Hello"), limit=5)
    assert synced == ["incoming/", "received"]
    await local.publish(upload_id)
    assert synced[2:] == ["published", "received"]
    await local.save_thumbnail(upload_id, b"small")
    assert synced[4:] == ["incoming/", "thumbnails"]
    await local.delete(upload_id)
    assert synced[6:] == ["published", "thumbnails"]


@pytest.fixture
def log_once_more() -> Iterator[None]:
    """Reset the warning that the store logs only once in a process."""
    _warn_that_names_are_not_synced.cache_clear()
    yield
    _warn_that_names_are_not_synced.cache_clear()


def refusing_folders(call: str, number: int) -> Callable[..., int]:
    """Return os.open or os.fsync with an error for directories."""
    real: Callable[..., int] = getattr(os, call)

    def refuse(target: int | Path, *arguments: int) -> int:
        path = Path(f"/proc/self/fd/{target}" if isinstance(target, int) else target)
        if path.is_dir():
            raise OSError(number, os.strerror(number))
        return real(target, *arguments)

    return refuse


@pytest.mark.usefixtures("log_once_more")
@pytest.mark.parametrize(
    ("call", "number"),
    [
        ("fsync", errno.EINVAL),
        ("fsync", errno.ENOTSUP),
        ("fsync", errno.EBADF),
        ("open", errno.EINVAL),
    ],
)
async def test_uploads_work_without_a_sync_of_directories_and_a_warning_is_logged_once(
    local: LocalStore,
    upload_id: str,
    monkeypatch: pytest.MonkeyPatch,
    call: str,
    number: int,
) -> None:
    """SMB, shared folders of virtual machines and some FUSE file systems have no such sync."""
    monkeypatch.setattr(os, call, refusing_folders(call, number))
    with capture_logs() as lines:
        assert await local.check()
        await local.receive(upload_id, stream(b"Hello"), limit=5)
        await local.publish(upload_id)
        assert await local.read(upload_id, 0, 5) == b"Hello"
        await local.delete(upload_id)
    (line,) = lines
    assert "cannot sync a directory" in line["event"]
    assert line["reason"] == errno.errorcode[number]


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EACCES])
async def test_a_failed_sync_of_a_directory_is_an_error(
    local: LocalStore, upload_id: str, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    await local.check()
    monkeypatch.setattr(os, "fsync", refusing_folders("fsync", number))
    with pytest.raises((StoreFull, StoreUnavailable)) as refused:
        await local.receive(upload_id, stream(b"Hello"), limit=5)
    assert errno.errorcode[number] in reason_of(refused.value)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.EROFS, "No", "/up"), "EROFS: No: /up; mount the file system writable"),
        (OSError(errno.EBUSY, "No"), "EBUSY: No"),
        (OSError("No"), "OSError('No')"),
        (ValueError("No"), "ValueError('No')"),
    ],
)
def test_the_reason_names_the_error_and_a_remedy(error: Exception, reason: str) -> None:
    refused = StoreUnavailable()
    refused.__cause__ = error
    assert reason_of(refused) == reason
    assert reason_of(error) == reason


async def test_a_failed_check_is_logged_each_time_its_reason_changes(
    local: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    with capture_logs() as lines:
        for number in (errno.EROFS, errno.EROFS, errno.ENOSPC):
            with monkeypatch.context() as broken:
                broken.setattr(os, "fsync", failing_with(number))
                assert not await local.check()
        assert await local.check()
        assert await local.check()
    assert [line["event"] for line in lines] == [
        "uploads cannot be stored",
        "uploads cannot be stored",
        "uploads can be stored again",
    ]
    assert [line["reason"][:6] for line in lines[:2]] == ["EROFS:", "ENOSPC"]
    assert "free some space" in lines[1]["reason"]


@pytest.mark.parametrize("folder", ["received", "published", "thumbnails"])
async def test_a_planted_link_is_never_followed(
    local: LocalStore, tmp_path: Path, upload_id: str, folder: str
) -> None:
    await local.check()
    secret = tmp_path / "secret"
    secret.write_text("secret")
    (tmp_path / "up" / folder / upload_id).symlink_to(secret)
    with pytest.raises(NoSuchUpload):
        await local.head(upload_id)
    with pytest.raises(NoSuchUpload):
        await local.read(upload_id, 0, 6)
    with pytest.raises(NoSuchUpload):
        await local.thumbnail(upload_id)
    await local.receive(upload_id, stream(b"Hello"), limit=5)
    await local.publish(upload_id)
    await local.save_thumbnail(upload_id, b"small")
    assert await local.read(upload_id, 0, 5) == b"Hello"
    assert await local.thumbnail(upload_id) == b"small"
    assert secret.read_text() == "secret"


async def test_a_link_planted_under_a_temporary_name_is_refused(
    local: LocalStore, tmp_path: Path, upload_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    await local.check()
    name = uuid.uuid4()
    monkeypatch.setattr(uuid, "uuid4", lambda: name)
    secret = tmp_path / "secret"
    secret.write_text("secret")
    (tmp_path / "up" / "incoming" / name.hex).symlink_to(secret)
    with pytest.raises(StoreUnavailable):
        await local.receive(upload_id, stream(b"Hello"), limit=5)
    assert secret.read_text() == "secret"


def partial_file(root: Path, name: str, age: float) -> Path:
    """Create a partial file in incoming/, last written `age` seconds ago."""
    file = root / "incoming" / name
    file.touch()
    os.utime(file, (time.time() - age, time.time() - age))
    return file


async def test_old_partial_files_are_swept_and_new_ones_stay(
    local: LocalStore, tmp_path: Path, upload_id: str
) -> None:
    assert await local.sweep(0) == 0
    await local.receive(upload_id, stream(b"Hello"), limit=5)
    old, new = "0" * 32, "1" * 32
    partial_file(tmp_path / "up", old, age=100)
    partial_file(tmp_path / "up", new, age=0)
    assert await local.sweep(60) == 1
    assert files(tmp_path / "up") == sorted([f"incoming/{new}", f"received/{upload_id}"])


async def test_an_upload_in_flight_is_not_swept_even_if_its_file_looks_old(
    local: LocalStore, tmp_path: Path, upload_id: str
) -> None:
    """A clock set forward makes it look old. Another process on the same directory keeps it too."""
    other = LocalStore(tmp_path / "up")

    async def slow() -> AsyncIterator[bytes]:
        yield bytes(2 * MIB)
        (file,) = (tmp_path / "up" / "incoming").iterdir()
        os.utime(file, (0, 0))
        for store in (local, other):
            assert await store.sweep(3600) == 0
        yield b"!"

    received = await local.receive(upload_id, slow(), limit=3 * MIB)
    assert received.size == 2 * MIB + 1


async def test_a_file_that_cannot_be_swept_does_not_block_the_others(
    local: LocalStore, tmp_path: Path
) -> None:
    """The failure is logged once. A file with a foreign name is never removed."""
    await local.check()
    foreign = ["incoming/.DS_Store", "incoming/.nfs0001", "incoming/zzz"]
    for name in foreign:
        partial_file(tmp_path / "up", Path(name).name, age=100)
    (tmp_path / "up" / "incoming" / ("2" * 32)).mkdir()
    os.utime(tmp_path / "up" / "incoming" / ("2" * 32), (0, 0))
    for number in range(5):
        partial_file(tmp_path / "up", f"{number:032x}", age=100)
    with capture_logs() as lines:
        assert await local.sweep(60) == 5
        assert await local.sweep(60) == 0
    assert files(tmp_path / "up") == foreign
    refusals = [line for line in lines if line["event"] == "cannot be swept"]
    assert {line["reason"].partition(":")[0] for line in refusals} == {"EINVAL", "EISDIR"}
    refused = [Path(line["path"]).name for line in refusals]
    assert sorted(refused) == [".DS_Store", ".nfs0001", "2" * 32, "zzz"]


async def test_without_locks_nothing_is_swept(
    local: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, upload_id: str
) -> None:
    """Without file locks the sweep cannot see whether a file is in use. Uploads still work."""
    monkeypatch.setattr(fcntl, "flock", failing_with(errno.ENOLCK))
    await local.receive(upload_id, stream(b"Hello"), limit=5)
    partial_file(tmp_path / "up", "0" * 32, age=100)
    assert await local.sweep(60) == 0
    assert len(files(tmp_path / "up")) == 2


async def test_an_upload_does_not_block_the_event_loop(
    local: LocalStore, upload_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, loop_thread = os.write, threading.get_ident()

    def write_slowly(descriptor: int, data: bytes) -> int:
        assert threading.get_ident() != loop_thread
        time.sleep(0.05)
        return real(descriptor, data)

    with monkeypatch.context() as slow:
        slow.setattr(os, "write", write_slowly)
        receiving = asyncio.create_task(
            local.receive(upload_id, stream(*[bytes(MIB)] * 3), limit=3 * MIB)
        )
        ticks = 0
        while not receiving.done():
            await asyncio.sleep(0.005)
            ticks += 1
    assert (await receiving).size == 3 * MIB
    assert ticks > 10


def test_the_message_of_an_error_is_its_docstring() -> None:
    assert re.match("There is no room", str(StoreFull()))
