"""The ticks of /board/live: one a second at most, shared by all viewers of a client."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from fastapi.testclient import TestClient

from afterward.errors import QueueUnavailable
from afterward.events import Event, EventType
from afterward.task import Task
from app.api.server_sent_events import HEARTBEAT
from app.board import ticks as ticks_module
from app.board.ticks import Ticks, Viewer
from tests.api.requests import problem_of
from tests.support.service import Service, until


class Numbers:
    """In place of the overview: its HTML counts how often it was read."""

    def __init__(self) -> None:
        self.reads = 0
        self.error: Exception | None = None
        self.pause = 0.0
        self.html_is = "<p>{reads} for {client} at {prefix}</p>"

    def now(self) -> float:
        """Return the time of the ticks."""
        return 1_800_000_000.0

    def numbers_of(self, _: str) -> "Numbers":
        """Return the read of a client, of which only `pause` is used."""
        return self

    async def html(self, client: str, prefix: str) -> str:
        """Render the numbers."""
        self.reads += 1
        if self.error is not None:
            raise self.error
        return self.html_is.format(reads=self.reads, client=client, prefix=prefix)


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ticks_module, "TICK_SECONDS", 0.02)


@pytest.fixture
def numbers() -> Numbers:
    return Numbers()


@pytest.fixture
def ticks(numbers: Numbers) -> Ticks:
    return Ticks(numbers)  # type: ignore[arg-type]


def change(client: str = "", kind: EventType = EventType.STARTED) -> Event:
    task = Task(
        id="1",
        kind="send_email",
        arguments="{}",
        client=client,
        created_at=1.0,
        updated_at=1.0,
        due_at=1.0,
    )
    return Event(kind, task)


async def next_frame(viewer: Viewer) -> bytes:
    async with asyncio.timeout(5):
        return await anext(viewer)


async def next_tick(viewer: Viewer) -> dict[str, Any]:
    """Return the data of the next frame, which must be a tick."""
    frame = (await next_frame(viewer)).decode()
    assert frame.startswith("event: tick\ndata: {")
    assert frame.endswith("}\n\n")
    data: dict[str, Any] = json.loads(frame.split("data: ")[1])
    return data


async def nothing_comes(viewer: Viewer) -> bool:
    """Whether no frame comes within the time of several ticks."""
    try:
        async with asyncio.timeout(0.1):
            await anext(viewer)
    except TimeoutError:
        return True
    return False


@asynccontextmanager
async def viewing(
    ticks: Ticks, client: str = "", *, with_numbers: bool = False
) -> AsyncIterator[Viewer]:
    """A viewer that has read its first tick."""
    with ticks.viewer(client, "/p", with_numbers=with_numbers) as viewer:
        await next_tick(viewer)
        yield viewer


@pytest.mark.anyio
async def test_a_tick_comes_at_once_and_then_after_each_change(ticks: Ticks) -> None:
    with ticks.viewer("", "", with_numbers=False) as viewer:
        assert await next_tick(viewer) == {"now": 1_800_000_000.0, "every": 5.0}
        assert await nothing_comes(viewer)
        ticks.record(change())
        assert await next_tick(viewer)


@pytest.mark.anyio
async def test_many_changes_make_one_tick(ticks: Ticks, numbers: Numbers) -> None:
    async with viewing(ticks, with_numbers=True) as viewer:
        for _ in range(1000):
            ticks.record(change())
        await next_tick(viewer)
        assert await nothing_comes(viewer)
        assert numbers.reads == 2


@pytest.mark.anyio
async def test_a_viewer_hears_of_the_changes_of_its_own_client_only(ticks: Ticks) -> None:
    async with viewing(ticks, "ada") as ada, viewing(ticks, "eve") as eve:
        ticks.record(change("ada"))
        assert await next_tick(ada)
        assert await nothing_comes(eve)


@pytest.mark.anyio
async def test_an_attempt_that_lost_its_task_is_no_change(ticks: Ticks) -> None:
    async with viewing(ticks) as viewer:
        ticks.record(change(kind=EventType.LOST))
        assert await nothing_comes(viewer)


@pytest.mark.anyio
async def test_viewers_share_the_bytes_and_one_read_of_the_numbers(
    ticks: Ticks, numbers: Numbers
) -> None:
    async with (
        viewing(ticks, "ada", with_numbers=True) as first,
        viewing(ticks, "ada", with_numbers=True) as second,
        viewing(ticks, "ada") as third,
    ):
        await nothing_comes(first)
        await nothing_comes(second)
        before = numbers.reads
        ticks.record(change("ada"))
        frames = [await next_frame(viewer) for viewer in (first, second)]
        assert frames[0] is frames[1]
        assert b" for ada at /p" in frames[0]
        assert "html" not in await next_tick(third)
        assert numbers.reads == before + 1


@pytest.mark.anyio
async def test_a_slow_viewer_skips_ticks_and_holds_only_the_newest(ticks: Ticks) -> None:
    async with viewing(ticks, with_numbers=True) as viewer:
        for _ in range(3):
            ticks.record(change())
            await asyncio.sleep(0.05)
        assert "<p>4 for" in (await next_tick(viewer))["html"]
        assert await nothing_comes(viewer)


@pytest.mark.anyio
async def test_without_changes_there_are_heartbeats(
    ticks: Ticks, numbers: Numbers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But numbers that have changed by themselves, such as the health, are shown."""
    monkeypatch.setattr(ticks_module, "QUIET_SECONDS", 0.05)
    numbers.html_is = "<p>the same</p>"
    async with viewing(ticks) as plain, viewing(ticks, with_numbers=True) as viewer:
        while await next_frame(plain) != HEARTBEAT:
            pass
        while await next_frame(viewer) != HEARTBEAT:
            pass
        numbers.html_is = "<p>changed</p>"
        while (frame := await next_frame(viewer)) == HEARTBEAT:
            pass
        assert b"changed" in frame
        assert await next_frame(plain) == HEARTBEAT


@pytest.mark.anyio
async def test_an_outage_of_the_database_is_told_and_the_ticks_go_on(
    ticks: Ticks, numbers: Numbers
) -> None:
    async with viewing(ticks, with_numbers=True) as viewer:
        numbers.error = QueueUnavailable()
        ticks.record(change())
        assert "problem" in await next_tick(viewer)
        numbers.error = LookupError("a bug")
        ticks.record(change())
        assert await next_frame(viewer) == HEARTBEAT
        numbers.error = None
        ticks.record(change())
        assert "html" in await next_tick(viewer)


@pytest.mark.anyio
async def test_with_many_open_pages_each_loads_itself_less_often(ticks: Ticks) -> None:
    viewers = [ticks.viewer("", "", with_numbers=False) for _ in range(200)]
    entered = [viewer.__enter__() for viewer in viewers]
    assert {(await next_tick(viewer))["every"] for viewer in entered} == {20.0}
    for viewer in viewers:
        viewer.__exit__(None, None, None)


@pytest.mark.anyio
async def test_a_tick_waits_until_the_numbers_are_read_again(
    ticks: Ticks, numbers: Numbers
) -> None:
    """Otherwise it could show numbers that are older than the change."""
    async with viewing(ticks, with_numbers=True) as viewer:
        numbers.pause = 0.2
        ticks.record(change())
        assert await nothing_comes(viewer)


@pytest.mark.anyio
async def test_when_the_last_viewer_leaves_nothing_is_left(ticks: Ticks) -> None:
    async with viewing(ticks, "ada"), viewing(ticks, "ada"):
        assert [task for task in asyncio.all_tasks() if task.get_name() == "ticks"]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert not [task for task in asyncio.all_tasks() if task.get_name() == "ticks"]
    assert not ticks._audiences
    ticks.record(change("ada"))


@pytest.mark.anyio
async def test_at_the_stop_every_viewer_ends(ticks: Ticks) -> None:
    async with viewing(ticks) as viewer:
        ticks.close()
        assert [frame async for frame in viewer] == []
        with ticks.viewer("", "", with_numbers=False) as late:
            assert [frame async for frame in late] == []


# Over HTTP


@pytest.mark.thorough
def test_the_stream_ticks_and_ends_when_the_service_stops(service: Service) -> None:
    """A stream that did not end would hold up the stop."""
    ticked = False
    with service.client.stream("GET", "/board/live?part=numbers") as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["cache-control"] == "no-store"
        for line in response.iter_lines():
            if line.startswith("data: "):
                assert "Waiting" in json.loads(line.removeprefix("data: "))["html"]
                ticked = True
                service.stop(within=8)
    assert ticked


@pytest.fixture
def service(tmp_path: Any) -> Any:
    with Service(tmp_path) as service:
        yield service


def test_head_gets_the_head_alone(browser: TestClient) -> None:
    assert browser.head("/board/live").status_code == 200
    ticks = browser.app_state["board"].ticks
    until(lambda: not ticks._audiences, within=5)


def test_another_part_is_refused(browser: TestClient) -> None:
    problem_of(browser.get("/board/live?part=x", headers={"Accept": "text/event-stream"}), 422)
