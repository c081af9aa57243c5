"""Many readers of `/events`: each sees all changes, or a gap. One that returns gets the rest."""

import asyncio
import re
import resource
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

import pytest

from afterward.task import Task
from app.api import event_stream as stream_module
from app.api.event_stream import EventStream
from tests.api.streams import (
    Connection,
    SlowConnection,
    a_task,
    events_in,
    eventually,
    publish_tasks,
    served,
    stream_of_all_tasks,
)
from tests.support.service import PATIENCE, Service

pytestmark = pytest.mark.anyio

FEW_OR_MANY = pytest.mark.parametrize(
    "number", [50, pytest.param(1000, marks=pytest.mark.thorough)], ids=["few", "many"]
)
CHANGES = 300
MAILS = 10  # in each of two batches

_ID = re.compile(rb"(?m)^id: (.+)$")
_SUCCEEDED = re.compile(rb'"id":"([^"]+)","kind":"send_email","status":"succeeded"')


@FEW_OR_MANY
async def test_readers_see_all_changes_and_slow_ones_a_gap_and_then_the_rest(
    number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every tenth reader stops reading. It is cut off, and returns with the id of the gap."""
    monkeypatch.setattr(stream_module, "MOST_UNREAD", CHANGES // 3)
    tasks = [a_task(id=f"{n}", updated_at=1 + n / 1000) for n in range(CHANGES)]
    ids = [f"{task.updated_at:.6f}-{task.id}" for task in tasks]
    event_stream = EventStream()
    quick = [Connection() for _ in range(number - number // 10)]
    slow = [SlowConnection(blocks=3) for _ in range(number // 10)]
    async with AsyncExitStack() as stack:
        for connection in [*quick, *slow]:
            stream = stream_of_all_tasks(event_stream)
            await stack.enter_async_context(served(stream, connection))
        for task in tasks:
            publish_tasks(event_stream, task)
            await asyncio.sleep(0)
        await asyncio.sleep(0.01)
        event_stream.close()
        for connection in slow:
            connection.reads_again.set()

    assert {tuple(seen_by(connection)) for connection in quick} == {tuple(ids)}
    for connection in slow:
        *read, gap = events_in(connection.text)
        assert gap.event == "gap"
        rest = await replayed(tasks, gap.id)
        assert {event.id for event in read} | {*rest} == {*ids}


async def replayed(tasks: Sequence[Task], last_event_id: str) -> list[str]:
    """Return to a stream, and return the ids of the events up to the last of these tasks."""
    connection = Connection()
    stream = stream_of_all_tasks(EventStream(), tasks, last_event_id=last_event_id)
    async with served(stream, connection):
        await eventually(lambda: f"-{tasks[-1].id}\n" in connection.text)
        connection.gone.set()
    return seen_by(connection)


def seen_by(connection: Connection) -> list[str]:
    events = events_in(connection.text)
    assert {event.event for event in events} == {"task"}
    return [event.id for event in events]


@FEW_OR_MANY
async def test_readers_of_a_service_see_every_task_also_if_they_return(
    number: int, service: Service
) -> None:
    """Half of the readers are away while the second batch of mails is sent."""
    allow_many_connections()
    async with AsyncExitStack() as stack:
        loyal = [await stack.enter_async_context(following(service)) for _ in range(number // 2)]
        async with AsyncExitStack() as first_visit:
            early = [
                await first_visit.enter_async_context(following(service))
                for _ in range(number // 2)
            ]
            sent = await send_mails(service)
            await until_told([*loyal, *early], sent)
        sent |= await send_mails(service)
        late = [
            await stack.enter_async_context(following(service, ids_in(reader)[-1]))
            for reader in early
        ]
        for before, after in zip(early, late, strict=True):
            after.text += before.text
        await until_told([*loyal, *late], sent)
    assert not any(b"event: gap" in reader.text for reader in [*loyal, *late])
    for reader in loyal:
        told = {event_id for event_id in ids_in(reader) if event_id.partition(b"-")[2] in sent}
        assert len(told) == 3 * len(sent)  # queued, running, succeeded


class Follower:
    """The text of a stream that a client has read so far."""

    def __init__(self) -> None:
        self.text = b""
        self.begun = asyncio.Event()

    async def read(self, stream: asyncio.StreamReader) -> None:
        """Read until the end."""
        while some := await stream.read(1 << 20):
            self.text += some
            self.begun.set()


def ids_in(follower: Follower) -> list[bytes]:
    ids: list[bytes] = _ID.findall(follower.text)
    return ids


@asynccontextmanager
async def following(service: Service, last_event_id: bytes = b"") -> AsyncIterator[Follower]:
    """Follow `/events` in a block, from its beginning or after an event."""
    stream, writer = await asyncio.open_connection("127.0.0.1", service.port)
    returns = b"Last-Event-ID: %b\r\n" % last_event_id if last_event_id else b""
    writer.write(b"GET /events HTTP/1.1\r\nHost: localhost\r\n%b\r\n" % returns)
    follower = Follower()
    reading = asyncio.create_task(follower.read(stream))
    try:
        await asyncio.wait_for(follower.begun.wait(), PATIENCE)
        yield follower
    finally:
        reading.cancel()
        writer.close()


async def send_mails(service: Service) -> set[bytes]:
    """Send a batch, wait until all of it has succeeded, and return the ids of its tasks."""
    recipients = ["ada@example.com"] * MAILS
    batch = await asyncio.to_thread(
        service.post, "/send-notifications", json={"recipients": recipients}
    )
    tasks = batch.raise_for_status().json()["tasks"]
    for task in tasks:
        await asyncio.to_thread(service.wait_for, task["id"])
    return {task["id"].encode() for task in tasks}


async def until_told(followers: list[Follower], sent: set[bytes]) -> None:
    """Wait until every follower has been told that these tasks have succeeded."""
    async with asyncio.timeout(PATIENCE):
        for follower in followers:
            while not {*_SUCCEEDED.findall(follower.text)} >= sent:  # noqa: ASYNC110 - no event
                await asyncio.sleep(0.02)


def allow_many_connections() -> None:
    """Raise the limit of open files of this process, as the service does for itself."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
