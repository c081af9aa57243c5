"""While an outside service is away, the tasks that need it wait together; other tasks go on."""

import asyncio
import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from afterward import circuit_breaker as breaker
from afterward import worker as worker_module
from afterward.circuit_breaker import LONGEST_PAUSE_SECONDS
from afterward.engine import Engine
from afterward.errors import ServiceUnavailable, TemporaryError
from afterward.events import EventType
from afterward.queue import Queue
from afterward.retry import RetryPolicy
from afterward.task import Status
from afterward.unit_of_work import Context
from afterward.worker import Worker
from tests.library.support import NOW, Clock, Diary, opened, promise, queue_of, working

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("frequent_polls")]

PATIENT = RetryPolicy(give_up_after=3600)


class Service:
    """An outside service, which can be away."""

    def __init__(self) -> None:
        self.is_away = True
        self.used = 0
        self.used_at_once = 0
        self.most_at_once = 0
        self.answers = asyncio.Event()
        self.answers.set()

    async def use(self) -> None:
        """Use the service. Raises ServiceUnavailable while it is away."""
        self.used += 1
        self.used_at_once += 1
        self.most_at_once = max(self.most_at_once, self.used_at_once)
        try:
            await self.answers.wait()
            await asyncio.sleep(0.001)
            if self.is_away:
                raise ServiceUnavailable("connection refused")
        finally:
            self.used_at_once -= 1


@pytest.fixture
def service() -> Service:
    return Service()


@pytest.fixture
def send(service: Service) -> Callable[..., Any]:
    async def send(context: Context[None]) -> None:
        await service.use()

    return send


async def other(context: Context[None]) -> None:
    """A task that needs no service."""


def statuses(tasks: list[Any]) -> list[str]:
    return [task.status.value for task in tasks]


async def read(queue: Queue[None], tasks: list[Any]) -> list[Any]:
    return [await queue.engine.get(task.id) for task in tasks]


async def test_an_outage_costs_at_most_one_attempt_for_each_slot_of_the_worker(
    engine: Engine, clock: Clock, service: Service, send: Callable[..., Any]
) -> None:
    queue = queue_of(engine, send, other, now=clock, policy=PATIENT)
    tasks = [await promise(queue, send) for _ in range(20)]
    worker = Worker(queue, None, concurrency=3)
    await worker.run_until_idle()

    found = await read(queue, tasks)
    assert statuses(found) == ["retrying"] * 3 + ["queued"] * 17
    assert found[3:] == tasks[3:]
    # The first of the three opened the breaker: all of them wait for the end of its pause.
    assert {task.due_at for task in found[:3]} == {found[0].due_at}
    assert NOW + 0.8 <= found[0].due_at <= NOW + 1

    done = await promise(queue, other)
    await worker.run_until_idle()
    assert (await engine.get(done.id)).status is Status.SUCCEEDED
    assert service.used == 3


async def test_after_each_pause_one_task_probes_and_a_success_releases_all(
    engine: Engine, clock: Clock, service: Service, send: Callable[..., Any]
) -> None:
    queue = queue_of(engine, send, other, now=clock, policy=PATIENT)
    tasks = [await promise(queue, send) for _ in range(50)]
    worker = Worker(queue, None, concurrency=5)
    await worker.run_until_idle()
    used = []
    for _ in range(10):
        clock.now += LONGEST_PAUSE_SECONDS
        before = service.used
        await worker.run_until_idle()
        used.append(service.used - before)
    assert used == [1] * 10

    service.is_away, service.most_at_once = False, 0
    clock.now += LONGEST_PAUSE_SECONDS
    service.answers.clear()
    working = asyncio.create_task(worker.run_until_idle())
    while service.used_at_once < 1:  # noqa: ASYNC110 -- a test may poll
        await asyncio.sleep(0.005)
    for _ in range(5):
        await worker._claim_due()
    assert service.used_at_once == 1, "while a probe hangs, no other task runs"
    service.answers.set()
    await working
    assert set(statuses(await read(queue, tasks))) == {"succeeded"}
    assert service.most_at_once == 5
    assert service.used == 5 + 10 + 50


@pytest.mark.parametrize("error", [TemporaryError("greylisted"), OSError("a bug")])
async def test_a_probe_that_fails_for_its_own_reasons_ends_the_pause(
    engine: Engine, clock: Clock, service: Service, error: Exception
) -> None:
    failures = itertools.chain([ServiceUnavailable("away"), error], itertools.repeat(None))

    async def send(context: Context[None]) -> None:
        if failure := next(failures):
            raise failure

    queue = queue_of(engine, send, now=clock, policy=PATIENT)
    tasks = [await promise(queue, send) for _ in range(4)]
    worker = Worker(queue, None, concurrency=1)
    await worker.run_until_idle()
    clock.now += 1
    await worker.run_until_idle()
    assert statuses(await read(queue, tasks))[2:] == ["succeeded"] * 2


async def test_a_cancelled_probe_neither_ends_nor_lengthens_the_pause(
    engine: Engine, clock: Clock, service: Service, send: Callable[..., Any]
) -> None:
    queue = queue_of(engine, send, now=clock, policy=PATIENT)
    task = await promise(queue, send)
    worker = Worker(queue, None)
    await worker.run_until_idle()
    clock.now += 1
    service.answers.clear()
    await worker._claim_due()
    (probe,) = worker._attempts
    while not service.used_at_once:  # noqa: ASYNC110 -- a test may poll
        await asyncio.sleep(0.005)
    probe.cancel()
    await asyncio.wait([probe.asyncio_task])
    assert (await engine.get(task.id)).status is Status.QUEUED
    service.answers.set()
    await worker.run_until_idle()
    assert (await engine.get(task.id)).status is Status.RETRYING
    assert service.used == 3


async def test_the_last_attempt_is_at_the_end_of_the_task_s_time_even_if_a_pause_is_longer(
    engine: Engine, clock: Clock, service: Service, send: Callable[..., Any]
) -> None:
    queue = queue_of(engine, send, now=clock, policy=RetryPolicy(give_up_after=0.5))
    task = await promise(queue, send)
    worker = Worker(queue, None)
    await worker.run_until_idle()
    assert (await engine.get(task.id)).due_at == NOW + 0.5
    clock.now += 1
    await worker.run_until_idle()
    assert (await engine.get(task.id)).status is Status.FAILED


async def test_an_idle_worker_wakes_when_a_pause_ends(
    tmp_path: Path, service: Service, send: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On SQLite only: by PostgreSQL's clock the task is due a moment later, at the next poll."""
    monkeypatch.setattr(worker_module, "POLL_SECONDS", 60)
    monkeypatch.setattr(breaker, "FIRST_PAUSE_SECONDS", 0.2)
    async with opened(tmp_path / "queue.db") as engine:
        queue = queue_of(engine, send, now=time.time, policy=PATIENT)
        diary = Diary(queue)
        async with working(queue):
            await promise(queue, send)
            await diary.until(EventType.RETRYING)
            service.is_away = False
            await diary.until(EventType.SUCCEEDED, within=30)


async def test_an_outage_is_logged_when_it_begins_once_a_minute_and_when_it_ends(
    engine: Engine, clock: Clock, service: Service, send: Callable[..., Any]
) -> None:
    queue = queue_of(engine, send, now=clock, policy=PATIENT)
    for _ in range(30):
        await promise(queue, send)
    worker = Worker(queue, None, concurrency=3)
    with capture_logs() as lines:
        for _ in range(600):
            await worker.run_until_idle()
            clock.now += 1
        service.is_away = False
        clock.now += LONGEST_PAUSE_SECONDS
        await worker.run_until_idle()
    first, *still, last = [line for line in lines if line.get("kind") == "send"]
    assert first["event"] == "a service is away, its tasks wait"
    assert first["error"] == "connection refused"
    assert first["task_id"]
    assert {line["event"] for line in still} == {"a service is still away"}
    assert 5 <= len(still) <= 10
    assert last["event"] == "a service is back, its tasks go on"
    assert (last["away_for"], last["waiting"]) == (600 + LONGEST_PAUSE_SECONDS, 29)
