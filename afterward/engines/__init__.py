"""The databases that keep tasks: `open_engine` chooses one by its URL.

sqlite    one file, for one process
postgres  one server, for any number of processes on any number of machines

Each implements `afterward.engine.Engine`, and is imported only when a URL asks for it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from afterward.engine import Engine
from afterward.errors import CannotStart

_POSTGRESQL = ("postgresql://", "postgres://")


def open_engine(url: str) -> Engine:
    """Return the engine for this URL, not started yet.

    `sqlite:///queue.db` is a path relative to the working directory, `sqlite:////srv/queue.db` an
    absolute one. Raises CannotStart if the URL names no known database, or if the packages for the
    database are not installed.
    """
    if url.startswith("sqlite:///"):
        from afterward.engines.sqlite.engine import SQLite

        return SQLite(Path(url.removeprefix("sqlite:///")))
    if url.startswith(_POSTGRESQL):
        with _extra_installed():
            from afterward.engines.postgres.engine import Postgres
        return Postgres(url)
    raise CannotStart(f"QUEUE_URL names no known database: {url.partition(':')[0]!r}")


async def make_tables(url: str) -> None:
    """Create or upgrade the tables on PostgreSQL. Raises CannotStart.

    SQLite's tables are created when the engine starts.
    """
    if url.startswith(_POSTGRESQL):
        with _extra_installed():
            from afterward.engines.postgres.schema import migrate
        await migrate(url)


@contextmanager
def _extra_installed() -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        raise CannotStart(
            f"QUEUE_URL: PostgreSQL needs {error.name}: "
            "run pip install '.[postgres]' in a checkout of this project"
        ) from error
