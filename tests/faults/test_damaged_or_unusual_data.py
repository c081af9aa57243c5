"""A task's result is not JSON, a stored record lacks a field, or a caught mail cannot be parsed.

The task runs only once, because its work is done. Every list is answered, and shows the other
items.
"""

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from afterward.engines.sqlite.engine import SQLite
from afterward.task import Record, Status, Writes, new_id
from afterward.unit_of_work import Context
from afterward.worker import Worker
from app.main import create_app
from app.tasks.uploads import COLLECTION
from tests.library.support import NO_WAITS, NOW, Clock, opened, promise, queue_of
from tests.support.pages import BROWSER
from tests.support.service import settings_in, wait_for
from tests.support.torture import Tried, form

TASKS = form(20, 1000)


async def runs_of(engine: SQLite, result: object, error: Exception | None = None) -> list[str]:
    """Run tasks that return `result` or raise `error`; return the task id of each run."""
    ran: list[str] = []

    async def odd(context: Context[None]) -> object:
        ran.append(context.task.id)
        if error is not None:
            raise error
        return result

    queue = queue_of(engine, odd, now=Clock(), policy=NO_WAITS)
    tasks = [await promise(queue, odd) for _ in range(TASKS)]
    await Worker(queue, None).run_until_idle()
    ended = [await engine.get(task.id) for task in tasks]
    assert {task.status for task in ended} == {Status.FAILED}
    return ran


@pytest.mark.anyio
@pytest.mark.parametrize("result", [object(), {1, 2}, float("nan"), b"bytes", {"at": NOW, 1: {2}}])
async def test_a_task_with_a_result_that_is_not_json_runs_once(
    tmp_path: Path, tried: Tried, result: object
) -> None:
    async with opened(tmp_path / "queue.db") as engine:
        ran = await runs_of(engine, result)
    tried(f"{TASKS} tasks return {type(result).__name__}", f"{len(ran)} runs")
    assert len(ran) == len(set(ran)) == TASKS


@pytest.mark.anyio
async def test_control_a_task_that_raises_runs_again(tmp_path: Path, tried: Tried) -> None:
    """The test counts repeated runs, so it would notice a bad result that is retried."""
    async with opened(tmp_path / "queue.db") as engine:
        ran = await runs_of(engine, None, TypeError("this is no JSON"))
    tried(f"{TASKS} tasks raise TypeError", f"{len(ran)} runs")
    assert len(ran) == TASKS * NO_WAITS.attempts


NO_JSON = ["no JSON", "{", '"\\ud800"', "[" * 100_000]
NO_ERROR = ["{}", "[]", '{"type": 1, "detail": null}', '{"fact": "\\ud800"}', "null"]


@pytest.mark.parametrize(
    "damage",
    [
        *({"error": error} for error in NO_ERROR + NO_JSON),
        *({column: text} for column in ("result", "history", "body") for text in NO_JSON),
    ],
    ids=lambda damage: repr(damage)[:30],
)
def test_a_damaged_item_hides_no_other_item_of_its_list(
    tmp_path: Path, tried: Tried, damage: dict[str, str]
) -> None:
    ((column, value),) = damage.items()
    settings = settings_in(tmp_path)
    with TestClient(create_app(settings)) as client:
        task = client.post("/send-notification/ada@example.com").json()
        upload = client.post("/upload", files={"file": ("a.txt", b"Hello", "text/plain")}).json()
        wait_for(client, task["id"])
        wait_for(client, upload["id"])
        assert client.portal is not None
        damaged = Record(COLLECTION, "", new_id(NOW), {"filename": "b.txt"}, NOW)
        engine = client.app_state["queue"].engine
        client.portal.call(engine.put, Writes(records=(damaged,)))
    with closing(sqlite3.connect(tmp_path / "queue.db")) as database, database:
        table, row = ("records", damaged.id) if column == "body" else ("tasks", task["id"])
        database.execute(f"UPDATE {table} SET {column} = ? WHERE id = ?", (value, row))
    for name in ("1795846374397869034-00000000.eml", "1795846374397869035-00000000.eml"):
        (tmp_path / "inbox" / name).write_bytes(b"\xff\x00 no mail at all" * (name[18] == "4"))

    with TestClient(create_app(settings)) as client:
        tasks, uploads = client.get("/tasks"), client.get("/uploads")
        inbox = client.get("/inbox")
        pages = ["/", "/board/tasks", "/board/failures", "/board/uploads", f"/tasks/{task['id']}"]
        shown = [client.get(page, headers=BROWSER).status_code for page in pages]
    assert shown == [200] * len(pages)
    assert [answer.status_code for answer in (tasks, uploads, inbox)] == [200, 200, 200]
    assert task["id"] in {item["id"] for item in tasks.json()["data"]}
    assert {item["id"] for item in uploads.json()["data"]} == {upload["upload"]["id"], damaged.id}
    assert "ada@example.com" in inbox.text
    tried("lists of tasks, uploads and mails, each with a damaged item", "200, and all are shown")
