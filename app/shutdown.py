"""Hears SIGTERM and SIGINT before the server does, which first waits for its open requests."""

import asyncio
import contextlib
import signal
from collections.abc import Awaitable, Callable, Iterator
from types import FrameType

Handler = Callable[[int, FrameType | None], object]


class Stop:
    """Runs `function` once: begun by whoever asks first, finished for whoever waits."""

    def __init__(self, function: Callable[[], Awaitable[None]]) -> None:
        self._function = function
        self._loop = asyncio.get_running_loop()
        self._running: asyncio.Future[None] | None = None

    def begin(self) -> None:
        """Begin, unless it has begun; from the event loop."""
        if self._running is None:
            self._running = asyncio.ensure_future(self._function())

    async def finish(self) -> None:
        """Begin, unless it has begun, and wait for its end."""
        self.begin()
        assert self._running is not None
        await self._running

    @contextlib.contextmanager
    def begun_by_signals(self) -> Iterator[None]:
        """Begin on SIGTERM and SIGINT; afterwards their handler of before is called, too."""
        before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        ours = {number: self._then(old) for number, old in before.items() if callable(old)}
        try:
            for number, handler in ours.items():
                signal.signal(number, handler)
        except ValueError:  # not the main thread: a test's client, which sends no signals
            ours = {}
        try:
            yield
        finally:
            for number in ours:
                signal.signal(number, before[number])

    def _then(self, handler: Handler) -> Handler:
        def handle(number: int, frame: FrameType | None) -> None:
            self._loop.call_soon_threadsafe(self.begin)
            handler(number, frame)

        return handle
