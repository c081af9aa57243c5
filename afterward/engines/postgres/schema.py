"""Creates PostgreSQL's tables, and checks them at every start."""

import contextlib
from importlib.resources import files
from typing import Any

import asyncpg
import structlog

from afterward.engines.postgres.connections import (
    CLOSE_SECONDS,
    DATABASE_ERRORS,
    MIGRATION_PATIENCE_SECONDS,
    connect,
    in_one_line,
)
from afterward.errors import CannotStart, TablesMissing

SCHEMA = "afterward"
SCHEMA_VERSION = 1
_MIGRATION_LOCK = 0x41465457  # the advisory lock of a migration: "AFTW" in ASCII

log = structlog.get_logger(__name__)


async def check(connection: "asyncpg.Connection[Any]") -> None:
    """Raise CannotStart if commits are not durable, or if the tables are not of this version."""
    for setting in ("fsync", "synchronous_commit"):
        if await connection.fetchval("SELECT current_setting($1)", setting) == "off":
            raise CannotStart(
                f"the database runs with {setting} = off, so a crash would lose "
                f"accepted tasks. Set {setting} = on in PostgreSQL."
            )
    version = await _version(connection)
    if version > SCHEMA_VERSION:
        raise CannotStart(
            f"the database was migrated by a newer version (schema {version}, this one "
            f"knows {SCHEMA_VERSION}). It was left as it is."
        )
    if version < SCHEMA_VERSION:
        raise TablesMissing("the database has no tables of this version")


async def migrate(url: str) -> None:
    """Create the tables if they do not exist. Raises CannotStart."""
    # No time limit, because a migration may take long, and so may the wait for another one.
    connection = await connect(url, patience=MIGRATION_PATIENCE_SECONDS, command_timeout=None)
    try:
        await connection.execute("SET statement_timeout = 0")
        await connection.execute("SELECT pg_advisory_lock($1)", _MIGRATION_LOCK)
        version = await _version(connection)
        if version > SCHEMA_VERSION:
            await check(connection)
        if version == 0:
            async with connection.transaction():
                await connection.execute(f"CREATE SCHEMA IF NOT EXISTS {SCHEMA}")
                script = files("afterward.engines.postgres").joinpath("schema.sql").read_text()
                await connection.execute(script)
        log.info("migrated", schema=SCHEMA, version=SCHEMA_VERSION)
    except DATABASE_ERRORS as error:
        raise CannotStart(f"the database refuses the migration: {in_one_line(error)}") from error
    finally:
        with contextlib.suppress(*DATABASE_ERRORS):
            await connection.close(timeout=CLOSE_SECONDS)


async def _version(connection: "asyncpg.Connection[Any]") -> int:
    """Return the version of the tables, or 0 if there are none.

    Raises TablesMissing for tables from before the first release, which have version numbers too.
    """
    if await connection.fetchval("SELECT to_regclass($1)", f"{SCHEMA}.pgqueuer") is not None:
        raise TablesMissing(
            f"the tables in the schema {SCHEMA} are older than the first release. They were left "
            f"as they are: run ALTER SCHEMA {SCHEMA} RENAME TO {SCHEMA}_old, and then make new ones"
        )
    if await connection.fetchval("SELECT to_regclass($1)", f"{SCHEMA}.schema_version") is None:
        return 0
    version: int = await connection.fetchval(f"SELECT version FROM {SCHEMA}.schema_version")
    return version
