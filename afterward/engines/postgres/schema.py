"""PostgreSQL's connections and tables: reached, made, upgraded, and checked at every start."""

import asyncio
import re
import time
from importlib.resources import files
from typing import Any, TypeAlias

import asyncpg
import structlog

from afterward.errors import CannotStart

SCHEMA = "afterward"
SCHEMA_VERSION = 1
Session: TypeAlias = "asyncpg.Connection[Any] | asyncpg.pool.PoolConnectionProxy[Any]"
PATIENCE_SECONDS = 20.0  # how long a start waits for a database that does not answer yet
MIGRATION_PATIENCE_SECONDS = 120.0  # a migration may come with the first start of a PostgreSQL
STATEMENT_SECONDS = 10.0  # longer than any statement here takes
_MIGRATION = 0x41465457  # the number of the lock that lets one migrate at a time

# Whoever vanishes in the middle of a transaction holds up nobody for long: without these, a
# network that swallows packets leaves its locks in place for hours.
SESSION = {
    "application_name": "afterward",
    "idle_in_transaction_session_timeout": "10s",
    "statement_timeout": "10s",
    "tcp_keepalives_idle": "10",
    "tcp_keepalives_interval": "5",
    "tcp_keepalives_count": "3",
    # Every statement here takes a few rows by an index, in its order. Before the statistics know of
    # a sudden backlog, the planner would rather go through all of it, for each claim.
    "enable_seqscan": "off",
    "enable_sort": "off",
    "enable_hashjoin": "off",
    # So the values make no difference, and to plan a claim takes as long as to make it.
    "plan_cache_mode": "force_generic_plan",
}

# What connections raise, from the socket up to the server.
Troubles = (
    OSError,
    TimeoutError,
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
)
# Classes of errors (PostgreSQL's documentation, appendix A) for which a statement of ours is to
# blame: unsupported features, wrong cardinality, data, constraints, cursors, syntax and names.
_OUR_MISTAKES = ("0A", "21", "22", "23", "24", "26", "2B", "34", "42", "44")
_HOPELESS = (
    asyncpg.InvalidAuthorizationSpecificationError,
    asyncpg.InvalidCatalogNameError,
    asyncpg.ClientConfigurationError,
)

log = structlog.get_logger(__name__)


def is_our_mistake(error: Exception) -> bool:
    """Tell an error of a statement, which no waiting mends, from one of the server or the network.

    A table that is missing is one as well: an operator has to run the migration.
    """
    return isinstance(error, asyncpg.PostgresError) and (error.sqlstate or "").startswith(
        _OUR_MISTAKES
    )


def is_refusal(error: Exception) -> bool:
    """Whether the server answered a statement with this error, and so has undone it.

    An error that says that the connection ends (classes 08 and 57P) does not tell how far the
    statement came.
    """
    return isinstance(error, asyncpg.PostgresError) and not (error.sqlstate or "08").startswith(
        ("08", "57P")
    )


def options(url: str) -> dict[str, Any]:
    """How to connect."""
    has_several = len(_hosts(url)) > 1
    return {
        "dsn": url,
        "timeout": 5.0,
        "command_timeout": STATEMENT_SECONDS,
        "server_settings": SESSION,
        # Of several hosts the one that takes writes, which after a failover is another one.
        **({"target_session_attrs": "read-write"} if has_several else {}),
    }


async def connect(
    url: str, *, patience: float | None = None, **changes: Any
) -> "asyncpg.Connection[Any]":
    """Connect, once the database answers; `changes` are to the options above.

    Raises CannotStart, without the password, if the database has not answered for `patience`
    seconds (PATIENCE_SECONDS by default), and at once where waiting cannot help.
    """
    deadline = time.monotonic() + (PATIENCE_SECONDS if patience is None else patience)
    while True:
        try:
            connection: asyncpg.Connection[Any] = await asyncpg.connect(**options(url) | changes)
        except Troubles as error:
            reason = f"{type(error).__name__}: {error}".split("\n")[0]
            if isinstance(error, _HOPELESS):
                raise CannotStart(f"QUEUE_URL: {_place(url)} refuses: {error}") from error
            if time.monotonic() > deadline:
                raise CannotStart(f"QUEUE_URL: {_place(url)} does not answer: {reason}") from error
            log.warning("waiting for the database", place=_place(url), error=reason)
            await asyncio.sleep(1.0)
        else:
            return connection


def _hosts(url: str) -> list[str]:
    """Give the hosts of a URL, with their ports where it names them."""
    # Not urlsplit, which refuses an IPv6 address among several hosts.
    authority = re.split("[/?#]", url.partition("://")[2])[0]
    return authority.rpartition("@")[2].split(",")


def _place(url: str) -> str:
    """Name the hosts of a URL, each with its port, and without the password."""
    named = [host or "its socket" for host in _hosts(url)]
    return "PostgreSQL at " + ", ".join(
        host if re.search(r":\d+$", host) else f"{host}:5432" for host in named
    )


async def check(connection: "asyncpg.Connection[Any]") -> None:
    """Raise CannotStart unless commits are durable, and the tables those of this version."""
    for setting in ("fsync", "synchronous_commit"):
        if await connection.fetchval("SELECT current_setting($1)", setting) == "off":
            raise CannotStart(
                f"QUEUE_URL: the database runs with {setting} = off: after a crash it would have "
                "lost what was answered 202."
            )
    version = await _version(connection)
    if version > SCHEMA_VERSION:
        raise CannotStart(
            f"QUEUE_URL: the database was migrated by a newer version (schema {version}, this one "
            f"knows {SCHEMA_VERSION}). It was left as it is."
        )
    if version < SCHEMA_VERSION:
        raise CannotStart(
            "QUEUE_URL: the database has no tables of this version: run `python -m app migrate`."
        )


async def migrate(url: str) -> None:
    """Make the tables where they are missing. Raises CannotStart."""
    # Waiting for another migration may take long, and so may a migration.
    connection = await connect(url, patience=MIGRATION_PATIENCE_SECONDS, command_timeout=None)
    try:
        await connection.execute("SET statement_timeout = 0")
        await connection.execute("SELECT pg_advisory_lock($1)", _MIGRATION)
        version = await _version(connection)
        if version > SCHEMA_VERSION:
            await check(connection)
        if version == 0:
            async with connection.transaction():
                await connection.execute(f"CREATE SCHEMA IF NOT EXISTS {SCHEMA}")
                script = files("afterward.engines.postgres").joinpath("schema.sql").read_text()
                await connection.execute(script)
        log.info("migrated", schema=SCHEMA, version=SCHEMA_VERSION)
    except asyncpg.PostgresError as error:
        raise CannotStart(f"QUEUE_URL: the database refuses the migration: {error}") from error
    finally:
        await connection.close()


async def _version(connection: "asyncpg.Connection[Any]") -> int:
    """Give the version of the tables; 0 if there are none.

    Raises CannotStart for tables from before the first release, which were numbered as well.
    """
    if await connection.fetchval("SELECT to_regclass($1)", f"{SCHEMA}.pgqueuer") is not None:
        raise CannotStart(
            f"QUEUE_URL: the tables in the schema {SCHEMA} are older than the first release. They "
            f"were left as they are: run ALTER SCHEMA {SCHEMA} RENAME TO {SCHEMA}_old, and then "
            "`python -m app migrate`."
        )
    if await connection.fetchval("SELECT to_regclass($1)", f"{SCHEMA}.schema_version") is None:
        return 0
    version: int = await connection.fetchval(f"SELECT version FROM {SCHEMA}.schema_version")
    return version
