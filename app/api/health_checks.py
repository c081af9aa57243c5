"""The checks behind /readyz. Each runs at most once a second."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import structlog

from afterward.engine import Engine
from afterward.errors import QueueDamaged, QueueError
from app.mail.smtp import Mailer
from app.uploads.store import Store

CHECK_TIMEOUT = 3.0  # seconds; a check without a result by then has failed
CACHE_SECONDS = 1.0  # for which a result is reused

_now = time.monotonic

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Passed:
    """The results of the checks: True if the check has passed."""

    database: bool
    database_is_damaged: bool
    uploads: bool
    smtp: bool


class Health:
    """Checks whether the database, the store of uploads and the SMTP server work.

    A check writes to the disk, and /readyz needs no API key. So each check runs at most once a
    second, however many clients ask.
    """

    def __init__(self, engine: Engine, uploads: Store, mailer: Mailer) -> None:
        self._engine = engine
        self._database_is_damaged = False
        self._database = CachedCheck(self._check_database)
        self._uploads = CachedCheck(lambda: uploads.check())  # noqa: PLW0108
        self._smtp = CachedCheck(lambda: mailer.check())  # noqa: PLW0108

    async def check(self) -> Passed:
        """Run the checks, or return their results of the last second."""
        checks = (self._database.passes(), self._uploads.passes(), self._smtp.passes())
        database, uploads, smtp = await asyncio.gather(*checks)
        return Passed(database, self._database_is_damaged, uploads, smtp)

    async def _check_database(self) -> bool:
        try:
            await self._engine.check()
        except QueueError as error:
            self._database_is_damaged = isinstance(error, QueueDamaged)
            return False
        return True


class CachedCheck:
    """A check with a cache. Callers share a running check, and its result for CACHE_SECONDS."""

    def __init__(self, check: Callable[[], Awaitable[bool]]) -> None:
        self._check = check
        self._running: asyncio.Task[bool] | None = None
        self._cached_until = 0.0

    async def passes(self) -> bool:
        """Whether the check passes within CHECK_TIMEOUT. An error is a failed check."""
        if self._running is None or (self._running.done() and _now() >= self._cached_until):
            self._running = asyncio.create_task(self._run())
        return await asyncio.shield(self._running)  # if one caller is cancelled, others still wait

    async def _run(self) -> bool:
        checking = asyncio.ensure_future(self._check())
        done, _ = await asyncio.wait([checking], timeout=CHECK_TIMEOUT)
        checking.cancel()  # without waiting, because a database that hangs may not react at once
        self._cached_until = _now() + CACHE_SECONDS
        if not done:
            return False
        try:
            return checking.result()
        except Exception:
            log.exception("check failed")
            return False
