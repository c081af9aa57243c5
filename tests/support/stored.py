"""Puts tasks of any kind and status into the database of a service in this process."""

import asyncio
import time
from dataclasses import replace
from typing import Any

from fastapi.testclient import TestClient

from afterward.engine import Engine
from afterward.task import Outcome, Status, Task, Writes, new_id, to_json

KIND = "retired"  # no worker knows this kind, so its tasks keep their status


def put_tasks(client: TestClient, number: int, /, **changes: Any) -> list[Task]:
    """Put queued tasks, and return them, the newest first. Changes are fields of a task."""
    now = _queue(client).now()
    tasks = [_a_task(now, **changes) for _ in range(number)]
    _call(client, _queue(client).engine.put, Writes(tuple(tasks)))
    return tasks[::-1]


def failed_tasks(
    client: TestClient, number: int, /, *, smtp_code: int | None = None, **changes: Any
) -> list[Task]:
    """Put tasks that have failed with a PermanentError, and return them, the newest first."""
    tasks = put_tasks(client, number, **changes)
    error = {"type": "PermanentError", "detail": "Nobody of this name"}
    if smtp_code is not None:
        error["smtp_code"] = smtp_code  # type: ignore[assignment]
    queue = _queue(client)
    _call(client, _fail, queue.engine, tasks, to_json(error), queue.now())
    return tasks


def crash(client: TestClient, task: Task) -> None:
    """Let a worker that claims the task crash, and another one re-queue it."""
    _call(client, _crash, _queue(client).engine, task)


async def _crash(engine: Engine, task: Task) -> None:
    lease = 0.01
    for owner in ("mail-1:1:a", "mail-1:2:b"):
        await engine.claim(
            owner, kinds=[KIND], limit=1, suspect=False, now=time.time(), lease=lease
        )
        await asyncio.sleep(2 * lease)
    assert (await engine.get(task.id)).status is Status.RETRYING


async def _fail(engine: Engine, tasks: list[Task], error: str, now: float) -> None:
    left = {task.id for task in tasks}
    kinds = [*{task.kind for task in tasks}]
    claim = await engine.claim("mail-1:1:a", kinds=kinds, limit=10_000, now=now, lease=60)
    for task in claim.running:
        ending = (
            Outcome(Status.FAILED, error=error)
            if task.id in left
            else Outcome(Status.QUEUED, due_at=now, counts=False)
        )
        await engine.settle(task, ending, now)


def _a_task(now: float, **changes: Any) -> Task:
    task = Task(
        id=new_id(now),
        kind=KIND,
        arguments='{"args":[],"kwargs":{}}',
        created_at=now,
        updated_at=now,
        due_at=now,
        max_attempts=8,
    )
    return replace(task, **changes)


def _queue(client: TestClient) -> Any:
    return client.app_state["queue"]


def _call(client: TestClient, function: Any, *args: Any) -> Any:
    assert client.portal is not None
    return client.portal.call(function, *args)
