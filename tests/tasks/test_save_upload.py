"""Saving an upload, when somebody deletes it at the worst moment."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

import pytest

from app.files.local import LocalStore
from app.queue.sqlite import SQLite
from app.queue.task import Record, Writes, new_id
from app.tasks.tools import Context
from app.tasks.uploads import COLLECTION, make_thumbnail, save_upload
from tests.support.service import files_below

pytestmark = pytest.mark.anyio


class Stage:
    """An upload that was received, and the context of a task about it."""

    def __init__(self, engine: SQLite, uploads: LocalStore) -> None:
        self.engine = engine
        self.uploads = uploads
        self.upload_id = new_id(1_750_000_000)
        self.tools = self  # all that these tasks use of them is the engine and the store
        self.task = self  # and of the task, whose it is
        self.client = ""

    async def receive(self) -> None:
        """Bring it to where the request would have left it."""

        async def content() -> AsyncIterator[bytes]:
            yield b"Hello"

        await self.uploads.receive(self.upload_id, content(), limit=5)
        body = {"content_type": "text/plain", "status": "received"}
        record = Record(COLLECTION, "", self.upload_id, body, 0)
        await self.engine.put(Writes(records=(record,)))

    @property
    def context(self) -> Context:
        """The context, as the type checker knows it."""
        return cast("Context", self)


@pytest.fixture
async def stage(tmp_path: Path) -> AsyncIterator[Stage]:
    engine = SQLite(tmp_path / "queue.db")
    await engine.start()
    stage = Stage(engine, LocalStore(tmp_path / "uploads"))
    await stage.receive()
    yield stage
    await engine.stop()


async def test_an_upload_that_is_there_is_published(stage: Stage, tmp_path: Path) -> None:
    for _ in range(2):  # again, after a crash just before the end
        await save_upload(stage.context, upload_id=stage.upload_id)
        record = await stage.engine.read_record(COLLECTION, stage.upload_id, client="")
        assert record.body["status"] == "published"
        assert files_below(tmp_path / "uploads") == [f"published/{stage.upload_id}"]


@pytest.mark.parametrize("verb", ["head", "publish"])
async def test_an_upload_that_is_deleted_meanwhile_leaves_no_file(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    """The list forgets it first; then its bytes go, wherever the task has moved them by then."""
    real = getattr(stage.uploads, verb)

    async def deleted_meanwhile(upload_id: str) -> Any:
        result = await real(upload_id)
        await stage.engine.delete_record(Record(COLLECTION, "", upload_id, {}, 0))
        return result

    monkeypatch.setattr(stage.uploads, verb, deleted_meanwhile)
    assert await save_upload(stage.context, upload_id=stage.upload_id) is None
    assert files_below(tmp_path / "uploads") == []


async def test_there_is_no_thumbnail_of_what_was_deleted(stage: Stage) -> None:
    await stage.uploads.delete(stage.upload_id)
    await make_thumbnail(stage.context, upload_id=stage.upload_id)
