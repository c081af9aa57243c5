"""The database at QUEUE_URL. If it cannot start, the error names the setting and the command."""

import contextlib
from collections.abc import Iterator

from afterward import engines
from afterward.engine import Engine
from afterward.errors import CannotStart, TablesMissing


async def start_engine(url: str) -> Engine:
    """Return the engine of the queue, which is started. Raises CannotStart."""
    with _named():
        engine = engines.open_engine(url)
        await engine.start()
        return engine


async def make_tables(url: str) -> None:
    """Create the tables on PostgreSQL if they do not exist. Raises CannotStart."""
    with _named():
        await engines.make_tables(url)


@contextlib.contextmanager
def _named() -> Iterator[None]:
    """Begin the message of a CannotStart with QUEUE_URL, because the library knows no settings."""
    try:
        yield
    except TablesMissing as error:
        raise CannotStart(f"QUEUE_URL: {error.reason}. Run `python -m app migrate`.") from error
    except CannotStart as error:
        raise CannotStart(f"QUEUE_URL: {error}") from error
