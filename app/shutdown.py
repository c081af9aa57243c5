"""Begin the stop at SIGTERM and SIGINT, before the server waits for its open requests.

Event streams do not end by themselves, so the server would wait for them until its time limit.
"""

import asyncio
import contextlib
import signal
from collections.abc import Awaitable, Callable, Iterator
from types import FrameType

Handler = Callable[[int, FrameType | None], object]


class Stop:
    """Runs `function` once, at the first call of `begin` or `finish`."""

    def __init__(self, function: Callable[[], Awaitable[None]]) -> None:
        self._function = function
        self._loop = asyncio.get_running_loop()
        self._running: asyncio.Future[None] | None = None

    def begin(self) -> None:
        """Start the function, unless it has started. Call this from the event loop."""
        if self._running is None:
            self._running = asyncio.ensure_future(self._function())

    async def finish(self) -> None:
        """Start the function, unless it has started, and wait until it ends."""
        self.begin()
        assert self._running is not None
        await self._running

    @contextlib.contextmanager
    def begun_by_signals(self) -> Iterator[None]:
        """Inside a `with` block, SIGTERM and SIGINT call `begin`, then the previous handler."""
        previous = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        ours = {number: self._begin_then(old) for number, old in previous.items() if callable(old)}
        try:
            for number, handler in ours.items():
                signal.signal(number, handler)
        except ValueError:  # not in the main thread, as under a TestClient, which sends no signals
            ours = {}
        try:
            yield
        finally:
            for number in ours:
                signal.signal(number, previous[number])

    def _begin_then(self, handler: Handler) -> Handler:
        def handle(number: int, frame: FrameType | None) -> None:
            self._loop.call_soon_threadsafe(self.begin)
            handler(number, frame)

        return handle
