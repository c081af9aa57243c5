"""The tasks of an upload: deletion at any moment, missing files, and stores that refuse."""

from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any, cast

import pytest

from afterward.engines.sqlite.engine import SQLite
from afterward.errors import PermanentError, QueueUnavailable, ServiceUnavailable, TemporaryError
from afterward.registry import TaskKind
from afterward.retry import RetryPolicy
from afterward.task import Record, Status, Task, Writes, new_id
from afterward.unit_of_work import UnitOfWork
from app.settings import Settings
from app.tasks import registry
from app.tasks.tools import Context, Tools
from app.tasks.uploads import (
    COLLECTION,
    LARGEST_PICTURE,
    STORE_RETRY_SECONDS,
    make_thumbnail,
    remove_upload,
    retry_policy,
    save_upload,
)
from app.uploads.local import LocalStore
from app.uploads.pictures import PictureWorkerDied
from app.uploads.store import StoreFull, StoreUnavailable
from tests.library.support import Clock
from tests.support.service import files_below
from tests.support.task_runner import TaskRunner

pytestmark = pytest.mark.anyio

NOW = 1_750_000_000.0
HOUR = 3600.0


class Stage:
    """A received upload. It also stands in for the context of a task, and for its tools."""

    def __init__(self, engine: SQLite, uploads: LocalStore) -> None:
        self.engine = engine
        self.uploads = uploads
        self.upload_id = new_id(NOW)
        self.record = Record(COLLECTION, "", self.upload_id, {}, 0)
        self.tools = self  # these tasks use only the tools engine, uploads and pictures
        self.pictures = self
        self.task = self  # these tasks use only the task's client
        self.client = ""
        self.durable_tasks = UnitOfWork[Tools](
            registry(Settings(_env_file=None)), policy_of=lambda _: RetryPolicy(), now=lambda: NOW
        )

    async def receive(self, **changes: object) -> None:
        """Store the file and the record as the request does."""

        async def content() -> AsyncIterator[bytes]:
            yield b"Hello"

        await self.uploads.receive(self.upload_id, content(), limit=5)
        body = {"content_type": "text/plain", "status": "received", "size": 5} | changes
        record = Record(COLLECTION, "", self.upload_id, body, 0)
        await self.engine.put(Writes(records=(record,)))

    async def thumbnail(self, _: Path) -> bytes:
        """Return a fake thumbnail."""
        return b"a small picture"

    async def delete(self) -> None:
        """Delete the upload as the route does, then run the task that removes its file."""
        await self.engine.put(Writes(removed=(self.record,)))
        await remove_upload(self.context, upload_id=self.upload_id)

    @property
    def context(self) -> Context:
        """This object, as a Context for the type checker."""
        return cast("Context", self)


@pytest.fixture
async def stage(tmp_path: Path) -> AsyncIterator[Stage]:
    engine = SQLite(tmp_path / "queue.db")
    await engine.start()
    stage = Stage(engine, LocalStore(tmp_path / "uploads"))
    await stage.receive()
    yield stage
    await engine.stop()


async def test_a_received_upload_is_published(stage: Stage, tmp_path: Path) -> None:
    for _ in range(2):  # the second run is the attempt after a crash just before the end
        await save_upload(stage.context, upload_id=stage.upload_id)
        record = await stage.engine.read_record(COLLECTION, stage.upload_id, client="")
        assert record.body["status"] == "published"
        assert files_below(tmp_path / "uploads") == [f"published/{stage.upload_id}"]


async def test_an_upload_with_a_record_without_a_content_type_is_published(
    stage: Stage,
) -> None:
    await stage.engine.put(Writes(records=(stage.record,)))
    assert await save_upload(stage.context, upload_id=stage.upload_id)


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize(
    ("task", "at", "verb"),
    [
        (save_upload, "engine", "read_record"),
        (save_upload, "uploads", "head"),
        (save_upload, "uploads", "publish"),
        (save_upload, "engine", "update_record"),
        (make_thumbnail, "engine", "read_record"),
        (make_thumbnail, "pictures", "thumbnail"),
        (make_thumbnail, "uploads", "save_thumbnail"),
        (make_thumbnail, "engine", "update_record"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
async def test_an_upload_that_is_deleted_meanwhile_leaves_no_file(
    stage: Stage,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    task: Callable[..., Coroutine[Any, Any, object]],
    at: str,
    verb: str,
    moment: str,
) -> None:
    """The record and the file are removed just before or after each step of the task."""
    here = getattr(stage, at)
    real = getattr(here, verb)

    async def deleted_meanwhile(*arguments: Any, **options: Any) -> Any:
        monkeypatch.setattr(here, verb, real)
        if moment == "before":
            await stage.delete()
        result = await real(*arguments, **options)
        if moment == "after":
            await stage.delete()
        return result

    monkeypatch.setattr(here, verb, deleted_meanwhile)
    await task(stage.context, upload_id=stage.upload_id)
    assert files_below(tmp_path / "uploads") == []


@pytest.mark.parametrize("task", [save_upload, make_thumbnail], ids=lambda task: task.__name__)
async def test_if_the_upload_was_deleted_the_attempt_after_a_crash_removes_its_files(
    stage: Stage, tmp_path: Path, task: Callable[..., Coroutine[Any, Any, object]]
) -> None:
    """The first attempt crashed after it wrote the file, and before it read the record again."""
    await stage.engine.delete_record(stage.record)
    await stage.uploads.publish(stage.upload_id)
    await stage.uploads.save_thumbnail(stage.upload_id, b"small")
    await task(stage.context, upload_id=stage.upload_id)
    assert files_below(tmp_path / "uploads") == []


@pytest.mark.parametrize("task", [save_upload, make_thumbnail], ids=lambda task: task.__name__)
async def test_a_record_without_its_file_is_a_permanent_failure(
    stage: Stage, task: Callable[..., Coroutine[Any, Any, object]]
) -> None:
    """The client was promised this file, and no retry can restore it."""
    await stage.uploads.delete(stage.upload_id)
    with pytest.raises(PermanentError, match=f"the file of upload {stage.upload_id} is gone"):
        await task(stage.context, upload_id=stage.upload_id)


async def test_a_picture_that_is_too_large_to_copy_gets_no_thumbnail(stage: Stage) -> None:
    await stage.receive(size=LARGEST_PICTURE + 1)
    with pytest.raises(PermanentError, match="larger than 48 MiB"):
        await make_thumbnail(stage.context, upload_id=stage.upload_id)


async def test_the_file_of_an_upload_with_a_record_is_never_removed(
    stage: Stage, tmp_path: Path
) -> None:
    """This also holds if another client owns it."""
    stage.client = "another"
    with pytest.raises(PermanentError, match="its file stays"):
        await remove_upload(stage.context, upload_id=stage.upload_id)
    assert files_below(tmp_path / "uploads") == [f"received/{stage.upload_id}"]


@pytest.mark.parametrize("refusal", [StoreUnavailable, StoreFull, QueueUnavailable])
@pytest.mark.parametrize(
    ("task", "at", "verb"),
    [
        (save_upload, "uploads", "head"),
        (save_upload, "uploads", "publish"),
        (save_upload, "engine", "update_record"),
        (make_thumbnail, "uploads", "save_thumbnail"),
        (make_thumbnail, "engine", "update_record"),
        (remove_upload, "engine", "read_record"),
        (remove_upload, "uploads", "delete"),
    ],
)
async def test_an_upload_is_retried_if_its_store_or_database_refuses(
    stage: Stage,
    monkeypatch: pytest.MonkeyPatch,
    refusal: type[Exception],
    task: Callable[..., Awaitable[Any]],
    at: str,
    verb: str,
) -> None:
    """Other uploads do not wait, because the store may refuse only this file."""

    async def refuse(*_: object, **__: object) -> None:
        raise refusal

    if task is remove_upload:
        await stage.engine.put(Writes(removed=(stage.record,)))
    monkeypatch.setattr(getattr(stage, at), verb, refuse)
    with pytest.raises(TemporaryError) as raised:
        await task(stage.context, upload_id=stage.upload_id)
    assert not isinstance(raised.value, ServiceUnavailable)


def refuse_for_an_hour(stage: Stage, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the store refuse to publish for an hour of this clock, and then work again."""
    publish, returns_at = stage.uploads.publish, clock.now + HOUR

    async def refuse(upload_id: str) -> None:
        if clock.now < returns_at:
            raise StoreUnavailable
        await publish(upload_id)

    monkeypatch.setattr(stage.uploads, "publish", refuse)


def runner_on(stage: Stage, policy: RetryPolicy) -> TaskRunner:
    return TaskRunner(stage.engine, stage, TaskKind(save_upload, policy))


async def run_for_two_hours(runner: TaskRunner, stage: Stage) -> Task:
    """Queue the upload's task, let a worker try it for two hours, and return the task."""
    task = await runner.add(save_upload, upload_id=stage.upload_id)
    await runner.run(seconds=2 * HOUR)
    return await runner.read(task)


async def test_a_store_that_is_away_for_an_hour_fails_no_upload(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = runner_on(stage, retry_policy(Settings(_env_file=None)))
    refuse_for_an_hour(stage, runner.clock, monkeypatch)
    task = await run_for_two_hours(runner, stage)
    assert task.status is Status.SUCCEEDED
    assert task.attempts > Settings(_env_file=None).retry_attempts
    assert (task.max_attempts, task.gives_up_at) == (None, task.created_at + STORE_RETRY_SECONDS)
    assert files_below(tmp_path / "uploads") == [f"published/{stage.upload_id}"]


async def test_control_with_eight_attempts_the_upload_fails_within_the_hour(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So an hour is long enough to distinguish a limit of attempts from a limit of time."""
    runner = runner_on(stage, RetryPolicy(attempts=8))
    refuse_for_an_hour(stage, runner.clock, monkeypatch)
    task = await run_for_two_hours(runner, stage)
    assert task.status is Status.FAILED


async def test_an_unexpected_error_is_limited_by_attempts(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the picture process dies each time, the picture is the likely cause, and not an outage."""

    async def die(_: str) -> None:
        raise PictureWorkerDied

    monkeypatch.setattr(stage.uploads, "publish", die)
    settings = Settings(_env_file=None)
    task = await run_for_two_hours(runner_on(stage, retry_policy(settings)), stage)
    assert (task.status, task.attempts) == (Status.FAILED, settings.retry_attempts)


async def test_a_file_that_cannot_be_read_delays_no_other_upload(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock stands still, so both tasks are tried at the same moment."""
    bad, head = new_id(NOW), stage.uploads.head

    async def refuse_the_bad_one(upload_id: str) -> bytes:
        if upload_id == bad:
            raise StoreUnavailable
        return await head(upload_id)

    monkeypatch.setattr(stage.uploads, "head", refuse_the_bad_one)
    await stage.engine.put(Writes(records=(Record(COLLECTION, "", bad, {}, 0),)))
    runner = runner_on(stage, retry_policy(Settings(_env_file=None)))
    tasks = [
        await runner.add(save_upload, upload_id=upload_id) for upload_id in (bad, stage.upload_id)
    ]
    await runner.run()
    ended = [(await runner.read(task)).status for task in tasks]
    assert ended == [Status.RETRYING, Status.SUCCEEDED]


async def test_a_slow_attempt_keeps_the_thumbnail_that_another_one_has_led_to(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish = stage.uploads.publish

    async def publish_late(upload_id: str) -> None:
        monkeypatch.setattr(stage.uploads, "publish", publish)
        await save_upload(stage.context, upload_id=upload_id)
        await make_thumbnail(stage.context, upload_id=upload_id)
        await publish(upload_id)

    await stage.receive()
    monkeypatch.setattr(stage.uploads, "publish", publish_late)
    await save_upload(stage.context, upload_id=stage.upload_id)
    record = await stage.engine.read_record(COLLECTION, stage.upload_id, client="")
    assert record.body["thumbnail"] is True
