"""Tables of an earlier version are brought up to date, and nothing in them is lost."""

import sqlite3
from contextlib import closing
from pathlib import Path

import asyncpg
import pytest

from app.queue import sqlite_file
from app.queue.engine import Engine, make_tables, open_engine
from app.queue.errors import CannotStart
from app.queue.postgres_entries import queries_on
from tests.queue.support import LEASE, NOW, claim_one
from tests.support.postgres import Postgres

pytestmark = pytest.mark.anyio

VERSIONS = Path(__file__).parent / "versions"
EARLIER = range(1, sqlite_file.SCHEMA_VERSION)

TASK = f"'1', 'send_email', '{{}}', 'queued', 8, {NOW}, {NOW}, {NOW}"
COLUMNS = "id, kind, arguments, status, max_attempts, created_at, updated_at, due_at"


def record(version: int) -> str:
    """One record's values; since version 2 it has a client."""
    client = "'', " if version > 1 else ""
    return f"'uploads', {client}'1', '{{\"size\": 8}}', {NOW}"


async def nothing_is_lost(engine: Engine) -> None:
    """The one task and the one record are there; they are nobody's.

    The task, which was in a crash and then given back, comes as a suspect.
    """
    await engine.start()
    (task,) = await engine.list_tasks(client="", status=None, kind=None, after=None, limit=9)
    assert (task.id, task.client, task.created_at) == ("1", "", NOW)
    (record,) = await engine.list_records("uploads", client="", after=None, limit=9)
    assert (record.id, record.body) == ("1", {"size": 8})
    assert await engine.claim("worker-1", limit=9, suspect=False, now=NOW, lease=LEASE) == []
    assert (await claim_one(engine)).id == "1"
    await engine.stop()


@pytest.mark.parametrize("version", EARLIER)
async def test_sqlite_is_upgraded_at_the_start(tmp_path: Path, version: int) -> None:
    paths = old, new = tmp_path / "old.db", tmp_path / "new.db"
    with closing(sqlite3.connect(old, isolation_level=None)) as connection:
        connection.executescript((VERSIONS / f"sqlite_{version}.sql").read_text())
        connection.execute(f"PRAGMA user_version = {version}")
        connection.execute(f"INSERT INTO tasks ({COLUMNS}) VALUES ({TASK})")
        connection.execute(f"INSERT INTO records VALUES ({record(version)})")
        connection.execute("UPDATE tasks SET crashes = 1")

    await nothing_is_lost(open_engine(f"sqlite:///{old}"))

    sqlite_file.open_database(new).close()
    assert len({sqlite_tables(path) for path in paths}) == 1


def sqlite_tables(path: Path) -> tuple[object, ...]:
    """The version, the tables' columns in the order of their names, and all else that there is."""
    with closing(sqlite3.connect(path)) as connection:
        return tuple(
            tuple(connection.execute(query).fetchall())
            for query in (
                "PRAGMA user_version",
                """
                SELECT tables.name, columns.name, columns.type, "notnull", pk
                FROM pragma_table_list AS tables, pragma_table_info(tables.name) AS columns
                ORDER BY 1, 2
                """,
                "SELECT type, name FROM sqlite_schema ORDER BY 1, 2",
            )
        )


@pytest.mark.parametrize("version", EARLIER)
async def test_postgresql_is_upgraded_by_the_migration(postgres: Postgres, version: int) -> None:
    urls = old, new = postgres.new_database(), postgres.new_database()
    connection = await asyncpg.connect(old)
    await queries_on(connection).install()
    await connection.execute((VERSIONS / f"postgres_{version}.sql").read_text())
    await connection.execute(
        f"INSERT INTO afterward.tasks (entry, {COLUMNS}) VALUES (1, {TASK});"
        f"INSERT INTO afterward.records VALUES ({record(version)});"
        "UPDATE afterward.tasks SET crashes = 1;"
        "INSERT INTO afterward.pgqueuer (id, entrypoint, payload, status, priority, execute_after)"
        "VALUES (1, 'task', '1', 'queued', 1, now() - interval '1 second')"
    )
    await connection.close()

    with pytest.raises(CannotStart, match="python -m app migrate"):
        await open_engine(old).start()
    await make_tables(old)
    await nothing_is_lost(open_engine(old))

    await make_tables(new)
    assert len({postgres_tables(postgres, url) for url in urls}) == 1


def postgres_tables(postgres: Postgres, url: str) -> str:
    """The version, the columns in the order of their names, the indexes and the triggers."""
    return postgres.sql(
        """
        SELECT array(SELECT version FROM afterward.schema_version), array(
            SELECT (table_name, column_name, data_type, is_nullable, column_default, collation_name)
            FROM information_schema.columns WHERE table_schema = 'afterward'
            ORDER BY 1
        ), array(SELECT indexdef FROM pg_indexes WHERE schemaname = 'afterward' ORDER BY 1),
        array(
            SELECT pg_get_triggerdef(pg_trigger.oid) || prosrc
            FROM pg_trigger JOIN pg_proc ON pg_proc.oid = tgfoid ORDER BY 1
        )
        """,
        url,
    )
