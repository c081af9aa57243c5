"""The checks of /readyz, each of which is made once a second at most."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import structlog

from afterward.engine import Engine
from afterward.errors import QueueError
from app.mail.smtp import Mailer
from app.uploads.store import Store

CHECK_SECONDS = 3.0  # after which a check without a result has failed
KNOWN_SECONDS = 1.0  # for which a result is remembered

_now = time.monotonic

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Passed:
    """Which checks have passed."""

    database: bool
    uploads: bool
    smtp: bool


class Health:
    """Checks whether the database, the store of uploads and the SMTP server work.

    A check writes to the disk, and anybody may ask for it, without a key and at any rate. So it is
    made once a second at most, however many clients ask at once.
    """

    def __init__(self, engine: Engine, uploads: Store, mailer: Mailer) -> None:
        self._database = Remembered(lambda: _answers(engine.check()))
        self._uploads = Remembered(lambda: uploads.check())  # noqa: PLW0108
        self._smtp = Remembered(lambda: mailer.check())  # noqa: PLW0108

    async def check(self) -> Passed:
        """Make the checks, or remember their results."""
        checks = (self._database.passes(), self._uploads.passes(), self._smtp.passes())
        return Passed(*await asyncio.gather(*checks))


async def _answers(check: Awaitable[None]) -> bool:
    try:
        await check
    except QueueError:
        return False
    return True


class Remembered:
    """A check whose result is remembered for a second; callers that come meanwhile share it."""

    def __init__(self, check: Callable[[], Awaitable[bool]]) -> None:
        self._check = check
        self._running: asyncio.Task[bool] | None = None
        self._known_until = 0.0

    async def passes(self) -> bool:
        """Whether the check passes within CHECK_SECONDS. Never raises: an error has not passed."""
        if self._running is None or (self._running.done() and _now() >= self._known_until):
            self._running = asyncio.create_task(self._run())
        return await asyncio.shield(self._running)  # a caller may go away, and others wait on

    async def _run(self) -> bool:
        asking = asyncio.ensure_future(self._check())
        done, _ = await asyncio.wait([asking], timeout=CHECK_SECONDS)
        asking.cancel()  # and not waited for: a database that hangs does not let go at once
        self._known_until = _now() + KNOWN_SECONDS
        if not done:
            return False
        try:
            return asking.result()
        except Exception:
            log.exception("check failed")
            return False
