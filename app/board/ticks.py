"""Ticks tell the open pages that something changed: at most one a second.

A tick is made once for all viewers of a client, and they share its bytes. So 200 open dashboards
cost little more than one: for each of them, one write to a socket a second.

A page says by its `part` which ticks it needs:

None        a tick after each change of a task. The page then loads itself again.
"workers"   the same, and after QUIET_SECONDS without a change also a tick. Heartbeats of workers
            are not events, so the page of the workers must look for them.
"numbers"   a tick with the overview's numbers as HTML, after each change of a task. The health and
            the workers change without an event, so they are read after QUIET_SECONDS, too.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, Self

import structlog

from afterward.errors import QueueDamaged, QueueError
from afterward.events import Event, EventType
from afterward.task import to_json
from app.api.server_sent_events import HEARTBEAT
from app.board.numbers import OverviewNumbers

TICK_SECONDS = 1.0  # at least, between two ticks
QUIET_SECONDS = 15.0  # without a tick, after which a viewer gets a heartbeat
# A page without the numbers loads itself again after a tick. The tick says how often it may: every
# five seconds, and less often if so many of these pages are open that the process would have to
# answer more than ten of them a second. With 200 open pages that is every 20 seconds.
RELOAD_SECONDS = 5.0  # as RELOAD in app/static/board.js
RELOADS_PER_SECOND = 10.0
_AT_ONCE = 20  # viewers that are woken before other work gets a chance to run

Part = Literal["numbers", "workers"] | None

log = structlog.get_logger(__name__)


class Viewer:
    """An open page. `async for frame in viewer` gives its ticks and heartbeats.

    A viewer that reads slowly skips ticks, because only the newest waits for it.
    """

    def __init__(self) -> None:
        self._tick: bytes | None = None
        self._news = asyncio.Event()
        self._closed = False

    def __aiter__(self) -> Self:
        """Return the viewer itself."""
        return self

    async def __anext__(self) -> bytes:
        """Wait for the next frame."""
        if self._tick is None and not self._closed:
            self._news.clear()
            try:
                async with asyncio.timeout(QUIET_SECONDS):
                    await self._news.wait()
            except TimeoutError:
                return HEARTBEAT
        if self._tick is None:
            raise StopAsyncIteration
        tick, self._tick = self._tick, None
        return tick

    def show(self, tick: bytes) -> None:
        """Let the viewer read this tick next."""
        self._tick = tick
        self._news.set()

    def discard(self) -> None:
        """End the viewer at once."""
        self._tick = None
        self._closed = True
        self._news.set()


class Ticks:
    """Sends ticks to the viewers of each client. `record` subscribes to the queue's events."""

    def __init__(self, numbers: OverviewNumbers) -> None:
        self._numbers = numbers
        self._audiences: dict[str, dict[Part, _Audience]] = {}  # by client
        self._pages = 0  # that load themselves again after a tick
        self._closed = False

    def record(self, event: Event) -> None:
        """Let the viewers know that a task of their client changed."""
        if event.type is not EventType.LOST:  # it has not changed the task
            for audience in self._audiences.get(event.task.client, {}).values():
                audience.changed.set()

    def catch_up(self) -> None:
        """Let all viewers know that something may have changed, because events may be lost."""
        for audiences in self._audiences.values():
            for audience in audiences.values():
                audience.changed.set()

    @contextmanager
    def viewer(self, client: str, part: Part, prefix: str) -> Iterator[Viewer]:
        """Follow the changes of a client's tasks inside a `with` block.

        The first tick comes at once, because something may have changed between the page and now.
        Links in the numbers begin with `prefix`, which is the same for all pages of the service.
        """
        viewer = Viewer()
        audience = self._enter(viewer, client, part, prefix)
        self._pages += part != "numbers"
        if part == "numbers":
            audience.changed.set()
        else:
            viewer.show(self._reload())
        if self._closed:
            viewer.discard()
        try:
            yield viewer
        finally:
            self._pages -= part != "numbers"
            self._leave(viewer, client, part)

    def close(self) -> None:
        """End every viewer, because a server that stops waits for its responses to end."""
        self._closed = True
        for audiences in self._audiences.values():
            for audience in audiences.values():
                for viewer in audience.viewers:
                    viewer.discard()

    def _enter(self, viewer: Viewer, client: str, part: Part, prefix: str) -> "_Audience":
        audiences = self._audiences.setdefault(client, {})
        if part not in audiences:
            audiences[part] = _Audience(self._ticks_of(client, part, prefix))
        audiences[part].viewers.add(viewer)
        return audiences[part]

    def _leave(self, viewer: Viewer, client: str, part: Part) -> None:
        audiences = self._audiences[client]
        audiences[part].viewers.discard(viewer)
        if not audiences[part].viewers:
            audiences.pop(part).ticker.cancel()
        if not audiences:
            del self._audiences[client]

    def _ticks_of(self, client: str, part: Part, prefix: str) -> "_MakeTick":
        if part == "numbers":
            return _NumbersTicks(self._numbers, client, prefix).make

        async def make(*, changed: bool) -> bytes | None:
            return self._reload() if changed or part == "workers" else None

        return make

    def _reload(self) -> bytes:
        """Return a tick that lets a page load itself again, at most every so many seconds."""
        every = max(RELOAD_SECONDS, self._pages / RELOADS_PER_SECOND)
        return _tick(now=self._numbers.now(), every=every)


class _Audience:
    """Viewers that get the same ticks, and the asyncio task that makes them."""

    def __init__(self, make_tick: "_MakeTick") -> None:
        self._make_tick = make_tick
        self.viewers: set[Viewer] = set()
        self.changed = asyncio.Event()
        self.ticker = asyncio.create_task(self._tick_until_cancelled(), name="ticks")

    async def _tick_until_cancelled(self) -> None:
        while True:
            changed = await self._wait_for_change()
            try:
                tick = await self._make_tick(changed=changed)
            except Exception:  # the next tick tries again, after QUIET_SECONDS at most
                log.exception("a tick of the dashboard cannot be made")
                tick = None
            if tick is not None:
                await self._show(tick)
            await asyncio.sleep(TICK_SECONDS)

    async def _wait_for_change(self) -> bool:
        """Wait until something changed, but at most QUIET_SECONDS. Return whether it did.

        A change that comes from now on makes another tick, because this one may not show it.
        """
        try:
            async with asyncio.timeout(QUIET_SECONDS):
                await self.changed.wait()
        except TimeoutError:
            return False
        self.changed.clear()
        return True

    async def _show(self, tick: bytes) -> None:
        """Show a tick to all viewers, a few at a time."""
        for position, viewer in enumerate(tuple(self.viewers), start=1):
            viewer.show(tick)
            if position % _AT_ONCE == 0:
                await asyncio.sleep(0)


_MakeTick = Callable[..., Awaitable[bytes | None]]
"""Called with `changed=`, whether a task changed. Returns None if the viewers need no tick."""


class _NumbersTicks:
    """Makes the ticks with the numbers of one client."""

    def __init__(self, numbers: OverviewNumbers, client: str, prefix: str) -> None:
        self._numbers = numbers
        self._client = client
        self._prefix = prefix
        self._last_html = ""

    async def make(self, *, changed: bool) -> bytes | None:
        """Return a tick; None if no task changed, and the HTML is the same."""
        try:
            numbers = await self._numbers.read_newer(self._client)
        except QueueError as error:
            self._last_html = ""  # so that after the outage even the same numbers are shown
            return _tick(now=self._numbers.now(), problem=_problem(error))
        html = await self._numbers.html(numbers, self._prefix)
        if html == self._last_html and not changed:
            return None
        self._last_html = html
        return _tick(now=self._numbers.now(), html=html)


def _problem(error: QueueError) -> str:
    """Return an error in words for a person, who cannot "try again" as a program can."""
    damaged = isinstance(error, QueueDamaged)
    return "The database is damaged" if damaged else "The database does not answer"


def _tick(**facts: Any) -> bytes:
    """Write a tick. `now` is the time since the epoch, by which a page corrects its clock."""
    return b"event: tick\ndata: %b\n\n" % to_json(facts).encode()
