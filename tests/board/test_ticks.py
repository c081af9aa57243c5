"""The ticks of /board/live: one a second at most, shared by all viewers of a client."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from afterward.engines.sqlite.engine import SQLite
from afterward.errors import QueueDamaged, QueueUnavailable
from afterward.events import Event, EventType
from afterward.task import Task
from app.api.server_sent_events import HEARTBEAT
from app.api.static_files import static_file
from app.board import ticks as ticks_module
from app.board.activity import Activity
from app.board.ticks import Part, Ticks, Viewer
from tests.api.requests import problem_of
from tests.support.gate import served
from tests.support.service import Service, until


class Numbers:
    """In place of the numbers of the overview: the HTML counts how often they were read."""

    def __init__(self) -> None:
        self.reads = 0
        self.error: Exception | None = None
        self.takes = 0.0
        self.html_is = "<p>{reads} for {client} at {prefix}</p>"

    def now(self) -> float:
        """Return the time of the ticks."""
        return 1_800_000_000.0

    async def read_newer(self, client: str) -> str:
        """Return the client in place of its numbers."""
        self.reads += 1
        await asyncio.sleep(self.takes)
        if self.error is not None:
            raise self.error
        return client

    async def html(self, numbers: str, prefix: str) -> str:
        """Render the numbers."""
        return self.html_is.format(reads=self.reads, client=numbers, prefix=prefix)


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


async def frame_with(viewer: Viewer, text: bytes) -> bytes:
    """Return the next frame that contains this text."""
    async with asyncio.timeout(5):
        while text not in (frame := await anext(viewer)):
            pass
        return frame


async def nothing_comes(viewer: Viewer) -> bool:
    """Whether no frame comes within the time of several ticks."""
    try:
        async with asyncio.timeout(0.1):
            await anext(viewer)
    except TimeoutError:
        return True
    return False


@asynccontextmanager
async def viewing(ticks: Ticks, client: str = "", part: Part = None) -> AsyncIterator[Viewer]:
    """A viewer that has read its first tick."""
    with ticks.viewer(client, part, "/p") as viewer:
        await next_tick(viewer)
        yield viewer


@pytest.mark.anyio
async def test_a_tick_comes_at_once_and_then_after_each_change(ticks: Ticks) -> None:
    with ticks.viewer("", None, "") as viewer:
        assert await next_tick(viewer) == {"now": 1_800_000_000.0, "every": 5.0}
        assert await nothing_comes(viewer)
        ticks.record(change())
        assert await next_tick(viewer)


@pytest.mark.anyio
async def test_many_changes_make_one_tick(ticks: Ticks, numbers: Numbers) -> None:
    async with viewing(ticks, part="numbers") as viewer:
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
        viewing(ticks, "ada", "numbers") as first,
        viewing(ticks, "ada", "numbers") as second,
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
    async with viewing(ticks, part="numbers") as viewer:
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
    async with viewing(ticks) as plain, viewing(ticks, part="numbers") as viewer:
        assert await next_frame(plain) == HEARTBEAT
        assert await frame_with(viewer, HEARTBEAT)
        numbers.html_is = "<p>changed</p>"
        assert await frame_with(viewer, b"changed")
        assert await next_frame(plain) == HEARTBEAT


@pytest.mark.anyio
async def test_a_heartbeat_does_not_take_the_place_of_a_tick(
    ticks: Ticks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ticks_module, "QUIET_SECONDS", 0.05)
    parts: tuple[Part, ...] = (None, "numbers")
    for part in parts:
        async with viewing(ticks, part=part) as viewer:
            ticks.record(change())
            await asyncio.sleep(0.2)
            assert await next_tick(viewer)


@pytest.mark.anyio
async def test_the_page_of_the_workers_gets_ticks_without_changes(
    ticks: Ticks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A heartbeat of a worker is not an event, and neither is a heartbeat that does not come."""
    monkeypatch.setattr(ticks_module, "QUIET_SECONDS", 0.05)
    async with viewing(ticks, part="workers") as workers, viewing(ticks) as plain:
        for _ in range(2):
            assert b'"every":5.0' in await frame_with(workers, b"tick")
        assert await next_frame(plain) == HEARTBEAT


@pytest.mark.anyio
@pytest.mark.parametrize("part", [None, "workers"])
async def test_a_new_page_does_not_make_the_other_pages_load_themselves_again(
    ticks: Ticks, part: Part
) -> None:
    async with (
        viewing(ticks, part=part) as first,
        viewing(ticks, part=part),
        viewing(ticks, part="numbers"),
    ):
        assert await nothing_comes(first)


@pytest.mark.anyio
async def test_an_outage_of_the_database_is_told_and_the_ticks_go_on(
    ticks: Ticks, numbers: Numbers
) -> None:
    async with viewing(ticks, part="numbers") as viewer:
        numbers.error = QueueUnavailable()
        ticks.record(change())
        assert (await next_tick(viewer))["problem"] == "The database does not answer"
        numbers.error = QueueDamaged()
        ticks.record(change())
        assert (await next_tick(viewer))["problem"] == "The database is damaged"
        numbers.error = LookupError("a bug")
        ticks.record(change())
        assert await nothing_comes(viewer)
        numbers.error = None
        ticks.record(change())
        assert "html" in await next_tick(viewer)


@pytest.mark.anyio
async def test_after_an_outage_the_same_numbers_are_shown_again(
    ticks: Ticks, numbers: Numbers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing changes in an idle service, but its pages must not show the error any longer."""
    monkeypatch.setattr(ticks_module, "QUIET_SECONDS", 0.05)
    numbers.html_is = "<p>the same</p>"
    async with viewing(ticks, part="numbers") as viewer:
        numbers.error = QueueUnavailable()
        assert await frame_with(viewer, b"problem")
        numbers.error = None
        assert await frame_with(viewer, b"the same")


@pytest.mark.anyio
async def test_a_change_after_an_unexpected_error_is_shown_without_another_change(
    ticks: Ticks, numbers: Numbers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ticks_module, "QUIET_SECONDS", 0.1)
    async with viewing(ticks, part="numbers") as viewer:
        numbers.error = LookupError("a bug")
        ticks.record(change())
        await asyncio.sleep(0.05)
        numbers.error = None
        assert await frame_with(viewer, b"html")


@pytest.mark.anyio
async def test_numbers_that_are_read_slowly_hold_up_neither_other_pages_nor_heartbeats(
    ticks: Ticks, numbers: Numbers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ticks_module, "QUIET_SECONDS", 0.05)
    async with viewing(ticks, part="numbers") as viewer, viewing(ticks) as plain:
        numbers.takes = 60.0
        ticks.record(change())
        assert await next_tick(plain)
        assert await next_frame(viewer) == HEARTBEAT


@pytest.mark.anyio
async def test_a_change_while_the_numbers_are_read_makes_another_tick(
    ticks: Ticks, numbers: Numbers
) -> None:
    """The read may have missed it."""
    async with viewing(ticks, part="numbers") as viewer:
        numbers.takes = 0.05
        ticks.record(change())
        await asyncio.sleep(0.04)
        ticks.record(change())
        assert await next_tick(viewer)
        assert await next_tick(viewer)


@pytest.mark.anyio
async def test_all_viewers_get_a_tick_when_events_may_be_lost(ticks: Ticks) -> None:
    async with (
        viewing(ticks, "ada", "numbers") as numbers,
        viewing(ticks, "ada") as plain,
        viewing(ticks, "eve", "workers") as workers,
    ):
        ticks.catch_up()
        for viewer in (numbers, plain, workers):
            assert await next_tick(viewer)


@pytest.mark.anyio
async def test_with_many_open_pages_each_loads_itself_less_often(ticks: Ticks) -> None:
    """The pages of all clients count, but not the overviews, which do not load themselves."""
    with ExitStack() as pages:
        for number in range(200):
            pages.enter_context(ticks.viewer(f"c{number % 50}", None, ""))
            pages.enter_context(ticks.viewer("", "numbers", ""))
        async with viewing(ticks, "c1") as viewer:
            ticks.record(change("c1"))
            assert (await next_tick(viewer))["every"] == 20.1
    with ticks.viewer("c1", None, "") as viewer:
        assert (await next_tick(viewer))["every"] == 5.0


def test_the_dashboard_hears_of_events_that_may_be_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subscribers: list[Callable[[float], None]] = []
    monkeypatch.setattr(SQLite, "subscribe_to_gaps", lambda _, *given: subscribers.extend(given))
    caught_up: list[float | None] = []
    monkeypatch.setattr(Activity, "catch_up", lambda _, since: caught_up.append(since))
    monkeypatch.setattr(Ticks, "catch_up", lambda _: caught_up.append(None))
    with served(tmp_path) as client:
        for subscriber in subscribers:
            client.portal.call(subscriber, 5.0)  # type: ignore[union-attr]
    assert caught_up == [5.0, None]


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
        with ticks.viewer("", None, "") as late:
            assert [frame async for frame in late] == []


def test_the_script_spreads_its_reloads_beyond_the_shortest_pause_of_the_server() -> None:
    script = static_file("board.js").content.decode()
    assert f"const RELOAD = {ticks_module.RELOAD_SECONDS * 1000:.0f};" in script


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
