"""The databases that store tasks. `open_engine` chooses a database by its URL.

sqlite    one file, for one process
postgres  one server, for any number of processes on any number of machines

Each package implements `afterward.engine.Engine`. It is imported only if a URL names its database.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from afterward.engine import Engine
from afterward.errors import CannotStart

_POSTGRESQL = ("postgresql://", "postgres://")


def open_engine(url: str) -> Engine:
    """Return the engine for this URL, which is not started yet.

    `sqlite:///queue.db` is a path relative to the working directory, `sqlite:////srv/queue.db` an
    absolute path, and `postgresql://ada:secret@db.example.com/queue` a database on a server. Raises
    CannotStart if the URL names no known database, or if the packages for it are not installed.
    """
    if url.startswith("sqlite:///"):
        from afterward.engines.sqlite.engine import SQLite

        path = url.removeprefix("sqlite:///")
        if path in {"", ":memory:"}:
            raise CannotStart(f"{url} names no file, and tasks must survive a crash")
        return SQLite(Path(path))
    if url.startswith(_POSTGRESQL):
        with _explain_missing_package():
            from afterward.engines.postgres.engine import Postgres
        return Postgres(url)
    raise CannotStart(f"the URL names no known database: {url.partition(':')[0]!r}")


async def make_tables(url: str) -> None:
    """Create the tables on PostgreSQL if they do not exist. Raises CannotStart.

    For SQLite there is nothing to do, because the engine creates its tables when it starts.
    """
    if url.startswith(_POSTGRESQL):
        with _explain_missing_package():
            from afterward.engines.postgres.schema import migrate
        await migrate(url)


@contextmanager
def _explain_missing_package() -> Iterator[None]:
    """Raise CannotStart if an import in the `with` block fails."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise CannotStart(
            f"PostgreSQL needs {error.name}: "
            "run pip install '.[postgres]' in a checkout of this project"
        ) from error
