"""The checks behind /readyz. Each runs at most once a second."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial

import structlog

from afterward.engine import Engine
from afterward.errors import QueueDamaged, QueueError
from app.api.shared_read import SharedRead
from app.mail.smtp import Mailer
from app.uploads.store import Store

CHECK_TIMEOUT = 3.0  # seconds; a check without a result by then has failed
REUSED_SECONDS = 1.0  # for a result, however long the check took

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class CheckResults:
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
        self._database = _shared(self._check_database)
        # Each check looks its method up, so that tests can replace it in a running service.
        self._uploads = _shared(lambda: uploads.check())  # noqa: PLW0108 -- see above
        self._smtp = _shared(lambda: mailer.check())  # noqa: PLW0108 -- see above

    async def check(self) -> CheckResults:
        """Run the checks, or return their results of the last second."""
        checks = (self._database.get(), self._uploads.get(), self._smtp.get())
        database, uploads, smtp = await asyncio.gather(*checks)
        return CheckResults(database, self._database_is_damaged, uploads, smtp)

    async def _check_database(self) -> bool:
        try:
            await self._engine.check()
        except QueueError as error:
            self._database_is_damaged = isinstance(error, QueueDamaged)
            return False
        return True


def _shared(check: Callable[[], Awaitable[bool]]) -> SharedRead[bool]:
    return SharedRead(partial(_passes, check), reused=REUSED_SECONDS, longest=REUSED_SECONDS)


async def _passes(check: Callable[[], Awaitable[bool]]) -> bool:
    """Whether the check passes within CHECK_TIMEOUT. An error is a failed check."""
    checking = asyncio.ensure_future(check())
    done, _ = await asyncio.wait([checking], timeout=CHECK_TIMEOUT)
    checking.cancel()  # without waiting, because a database that hangs may not react at once
    if not done:
        return False
    try:
        return checking.result()
    except Exception:
        log.exception("check failed")
        return False
