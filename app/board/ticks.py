"""Ticks tell the open pages that something changed: at most one a second.

A tick is rendered once for all viewers of a client, and they share its bytes. So 200 open
dashboards cost little more than one: for each of them, one write to a socket a second.
"""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

import structlog

from afterward.errors import QueueError
from afterward.events import Event, EventType
from afterward.task import to_json
from app.api.server_sent_events import HEARTBEAT
from app.board.numbers import Overview

TICK_SECONDS = 1.0  # at least, between two ticks
QUIET_SECONDS = 15.0  # without a change, after which viewers get a heartbeat
# A page that shows more than the numbers loads itself again after a tick. The tick says how often
# it may: every five seconds, and less often if so many pages are open that the process would have
# to answer more than ten of them a second. With 200 open pages that is every 20 seconds.
RELOAD_SECONDS = 5.0
RELOADS_PER_SECOND = 10.0
_AT_ONCE = 20  # viewers that are woken before other work gets a chance to run

log = structlog.get_logger(__name__)


class Viewer:
    """An open page. `async for frame in viewer` gives its ticks and heartbeats.

    A viewer that reads slowly skips ticks, because only the newest waits for it.
    """

    def __init__(self, *, with_numbers: bool) -> None:
        self.with_numbers = with_numbers
        """Whether its ticks contain the overview's numbers as HTML."""
        self._frame: bytes | None = None
        self._news = asyncio.Event()
        self._closed = False

    def __aiter__(self) -> Self:
        """Return the viewer itself."""
        return self

    async def __anext__(self) -> bytes:
        """Wait for the next frame."""
        while self._frame is None and not self._closed:
            self._news.clear()
            await self._news.wait()
        if self._frame is None:
            raise StopAsyncIteration
        frame, self._frame = self._frame, None
        return frame

    def show(self, frame: bytes) -> None:
        """Let the viewer read this frame next."""
        self._frame = frame
        self._news.set()

    def discard(self) -> None:
        """End the viewer at once."""
        self._frame = None
        self._closed = True
        self._news.set()


class Ticks:
    """Sends ticks to the viewers of each client. `record` subscribes to the queue's events."""

    def __init__(self, overview: Overview) -> None:
        self._overview = overview
        self._audiences: dict[str, dict[str, _Audience]] = {}  # by client, then by prefix
        self._closed = False

    def record(self, event: Event) -> None:
        """Let the viewers know that a task of their client changed."""
        if event.type is not EventType.LOST:  # it has not changed the task
            for audience in self._audiences.get(event.task.client, {}).values():
                audience.changed.set()

    @contextmanager
    def viewer(self, client: str, prefix: str, *, with_numbers: bool) -> Iterator[Viewer]:
        """Follow the changes of a client's tasks inside a `with` block.

        The first tick comes at once, because something may have changed between the page and now.
        Links in the numbers begin with `prefix`.
        """
        audiences = self._audiences.setdefault(client, {})
        if prefix not in audiences:
            audiences[prefix] = _Audience(self._overview, client, prefix)
        audience, viewer = audiences[prefix], Viewer(with_numbers=with_numbers)
        audience.viewers.add(viewer)
        audience.changed.set()
        if self._closed:
            viewer.discard()
        try:
            yield viewer
        finally:
            audience.viewers.discard(viewer)
            if not audience.viewers:
                audience.ticker.cancel()
                self._remove(client, prefix)

    def _remove(self, client: str, prefix: str) -> None:
        del self._audiences[client][prefix]
        if not self._audiences[client]:
            del self._audiences[client]

    def close(self) -> None:
        """End every viewer, because a server that stops waits for its responses to end."""
        self._closed = True
        for audiences in self._audiences.values():
            for audience in audiences.values():
                for viewer in audience.viewers:
                    viewer.discard()


class _Audience:
    """The viewers of one client, and the asyncio task that makes their ticks."""

    def __init__(self, overview: Overview, client: str, prefix: str) -> None:
        self._overview = overview
        self._client = client
        self._prefix = prefix
        self._last_html = ""
        self.viewers: set[Viewer] = set()
        self.changed = asyncio.Event()
        self.ticker = asyncio.create_task(self._tick_until_cancelled(), name="ticks")

    async def _tick_until_cancelled(self) -> None:
        while True:
            changed = await self._wait_for_change()
            try:
                tick, numbers = await self._make_frames(changed=changed)
            except Exception:  # the next tick tries again
                log.exception("a tick of the dashboard cannot be made")
                tick = numbers = HEARTBEAT
            await self._show(tick, numbers)
            await asyncio.sleep(TICK_SECONDS)

    async def _wait_for_change(self) -> bool:
        """Wait until something changed, but at most QUIET_SECONDS. Return whether it did.

        Numbers that were read a moment ago are reused. So wait until they are read again, because
        they may be older than the change.
        """
        try:
            async with asyncio.timeout(QUIET_SECONDS):
                await self.changed.wait()
        except TimeoutError:
            return False
        if self._show_numbers:
            await asyncio.sleep(self._overview.numbers_of(self._client).pause)
        self.changed.clear()
        return True

    @property
    def _show_numbers(self) -> bool:
        return any(viewer.with_numbers for viewer in self.viewers)

    async def _make_frames(self, *, changed: bool) -> tuple[bytes, bytes]:
        """Return the frame for viewers without the numbers, and the frame for those with them.

        `now` is the time in seconds since the epoch, by which a page corrects its clock.
        """
        every = max(RELOAD_SECONDS, len(self.viewers) / RELOADS_PER_SECOND)
        facts = {"now": self._overview.now(), "every": every}
        tick = _tick(facts) if changed else HEARTBEAT
        if not self._show_numbers:
            return tick, tick
        try:
            html = await self._overview.html(self._client, self._prefix)
        except QueueError as error:
            return tick, _tick(facts | {"problem": str(error)})
        unchanged, self._last_html = html == self._last_html, html
        return tick, HEARTBEAT if unchanged and not changed else _tick(facts | {"html": html})

    async def _show(self, tick: bytes, numbers: bytes) -> None:
        """Show the frames to all viewers, a few at a time."""
        for position, viewer in enumerate(tuple(self.viewers), start=1):
            viewer.show(numbers if viewer.with_numbers else tick)
            if position % _AT_ONCE == 0:
                await asyncio.sleep(0)


def _tick(facts: dict[str, Any]) -> bytes:
    return b"event: tick\ndata: %b\n\n" % to_json(facts).encode()
