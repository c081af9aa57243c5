"""Connections to PostgreSQL: how they are opened, and what their errors mean."""

import asyncio
import contextlib
import re
import ssl
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import asyncpg
import structlog

from afterward.engines.postgres.outages import Outages
from afterward.errors import CannotStart, CommitUnknown, DiskFull, QueueUnavailable

Session: TypeAlias = "asyncpg.Connection[Any] | asyncpg.pool.PoolConnectionProxy[Any]"
POOL_SIZE = 5  # connections of one process, besides the one that listens
SEARCHES = 2  # connections of the pool that searches may hold at a time
CONNECT_SECONDS = 5.0  # to open a connection, or to get a free one from the pool
CLOSE_SECONDS = 3.0  # to close the connections in an orderly way
PATIENCE_SECONDS = 20.0  # at start, to wait for a server that does not answer yet
MIGRATION_PATIENCE_SECONDS = 120.0  # the server may be starting for the first time beside it
STATEMENT_SECONDS = 10.0  # longer than any statement of the engine takes

SESSION_SETTINGS = {
    "application_name": "afterward",
    # If a process or its network vanishes in the middle of a transaction, PostgreSQL must notice
    # and release the locks. Without these settings, a network that drops all packets leaves them in
    # place for hours.
    "idle_in_transaction_session_timeout": "10s",
    "statement_timeout": "10s",
    "tcp_keepalives_idle": "10",
    "tcp_keepalives_interval": "5",
    "tcp_keepalives_count": "3",
    # Every statement reads a few rows through an index, in the order of the index. Until the
    # statistics show a sudden backlog, the planner would scan and sort all tasks for each claim.
    "enable_seqscan": "off",
    "enable_sort": "off",
    "enable_hashjoin": "off",
    # Because of these settings, the plan is the same for all parameters. So plan each statement
    # once: to plan a claim takes as long as to execute it.
    "plan_cache_mode": "force_generic_plan",
}

# The errors of a connection, from the socket up to the server.
DATABASE_ERRORS = (
    OSError,
    TimeoutError,
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
)
# Classes of errors (PostgreSQL's documentation, appendix A) that mean a bug in a statement:
# unsupported features, wrong cardinality, data, constraints, cursors, syntax and names.
_STATEMENT_ERRORS = ("0A", "21", "22", "23", "24", "26", "2B", "34", "42", "44")
# A limit that is exceeded may be that of the server, such as its full queue of notifications, which
# passes. It is the fault of the statement if one of these functions of PostgreSQL reports it: a
# text is too long for its index.
_LIMIT_EXCEEDED = "54000"
_CHECKS_OF_INDEXES = ("_bt_check_third_page", "index_form_tuple_context")
# Errors at start that do not go away by waiting.
_PERMANENT_ERRORS = (
    asyncpg.InvalidAuthorizationSpecificationError,
    asyncpg.InvalidCatalogNameError,
    asyncpg.ClientConfigurationError,
    ssl.SSLCertVerificationError,
)

log = structlog.get_logger(__name__)


def is_statement_error(error: Exception) -> bool:
    """Tell whether an error is the fault of the statement, and not of the server or the network.

    Waiting does not help then. A missing table counts too: an operator has to run the migration.
    """
    if not isinstance(error, asyncpg.PostgresError):
        return False
    if error.sqlstate == _LIMIT_EXCEEDED:
        return error.server_source_function in _CHECKS_OF_INDEXES
    return (error.sqlstate or "").startswith(_STATEMENT_ERRORS)


def is_rolled_back(error: Exception) -> bool:
    """Tell whether the server answered a statement with this error, and so rolled it back.

    Errors that end the connection (classes 08 and 57P) do not tell how far the statement came.
    """
    return isinstance(error, asyncpg.PostgresError) and not (error.sqlstate or "08").startswith(
        ("08", "57P")
    )


def connection_options(url: str) -> dict[str, Any]:
    """Return the options of asyncpg for a connection to this URL."""
    has_several = len(_hosts(url)) > 1
    return {
        "dsn": url,
        "timeout": CONNECT_SECONDS,
        "command_timeout": STATEMENT_SECONDS,
        "server_settings": SESSION_SETTINGS,
        # Of several hosts, use the one that accepts writes. It changes with a failover.
        **({"target_session_attrs": "read-write"} if has_several else {}),
    }


async def connect(
    url: str, *, patience: float | None = None, **changes: Any
) -> "asyncpg.Connection[Any]":
    """Open a connection; `changes` replace some of the options of `connection_options`.

    Waits for a server that does not answer yet: `patience` seconds, by default PATIENCE_SECONDS.
    Raises CannotStart after that, and at once if waiting cannot help, for example after a wrong
    password. The message names the server, but not the password.
    """
    deadline = time.monotonic() + (PATIENCE_SECONDS if patience is None else patience)
    while True:
        try:
            connection: asyncpg.Connection[Any] = await asyncpg.connect(
                **connection_options(url) | changes
            )
        except DATABASE_ERRORS as error:
            reason = f"{type(error).__name__}: {error}".split("\n")[0]
            if isinstance(error, _PERMANENT_ERRORS):
                raise CannotStart(f"{_place(url)} refuses: {in_one_line(error)}") from error
            if time.monotonic() > deadline:
                raise CannotStart(f"{_place(url)} does not answer: {reason}") from error
            log.warning("waiting for the database", place=_place(url), error=reason)
            await asyncio.sleep(1.0)
        except ValueError:
            # Neither the URL nor the error is shown, because a part of the password may be in both.
            raise CannotStart(
                "the URL of PostgreSQL cannot be read: its port must be a number, and / ? # @ : in "
                "a user or a password must be written as %2F %3F %23 %40 %3A"
            ) from None
        else:
            return connection


@contextlib.contextmanager
def explain_refusal(url: str) -> Iterator[None]:
    """Raise CannotStart, with the reason in one line, for an error of the database."""
    try:
        yield
    except DATABASE_ERRORS as error:
        raise CannotStart(f"{_place(url)} refuses: {in_one_line(error)}") from error


def in_one_line(error: Exception) -> str:
    """Describe an error of the database without its details, which are further lines."""
    return str(error).split("\n")[0] or type(error).__name__


def _hosts(url: str) -> list[str]:
    """Return the hosts of a URL: ["db1:5433", "db2"] for postgresql://ada@db1:5433,db2/queue."""
    # Not urlsplit, because it refuses an IPv6 address among several hosts.
    authority = re.split("[/?#]", url.partition("://")[2])[0]
    return authority.rpartition("@")[2].split(",")


def _place(url: str) -> str:
    """Name the hosts of a URL in a message, each with its port, and without the password."""
    named = [host or "its socket" for host in _hosts(url)]
    return "PostgreSQL at " + ", ".join(
        host if re.search(r":\d+$", host) else f"{host}:5432" for host in named
    )


class Pool:
    """Keeps up to POOL_SIZE connections, and translates their errors for callers of the engine.

    A session or a transaction raises DiskFull, CommitUnknown or QueueUnavailable. Errors that mean
    a bug, in a statement or in the use of asyncpg, are raised as they are.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._connections: asyncpg.Pool[Any] | None = None
        self._searches = asyncio.Semaphore(SEARCHES)
        self.outages = Outages(QueueUnavailable)

    async def open(self) -> None:
        """Make the pool. It opens a connection when one is needed."""
        self._connections = await asyncpg.create_pool(
            **connection_options(self._url),
            min_size=0,
            max_size=POOL_SIZE,
            reset=_skip_reset,
        )

    async def close(self) -> None:
        """Close the connections, at the latest after CLOSE_SECONDS."""
        try:
            async with asyncio.timeout(CLOSE_SECONDS):
                await self._opened().close()
        except (TimeoutError, *DATABASE_ERRORS):
            self._opened().terminate()

    @contextlib.asynccontextmanager
    async def session(self, *, reads_only: bool = False) -> AsyncIterator[Session]:
        """Lend a connection, on which each statement is a transaction of its own.

        With `reads_only` the caller changes nothing, so an error never means CommitUnknown.
        """
        with self.outages.watch(), _translate_errors() as commit:
            async with self._opened().acquire(timeout=CONNECT_SECONDS) as session:
                commit.may_be_sent = not reads_only
                with _note_misuse(session, commit):
                    yield session

    @contextlib.asynccontextmanager
    async def search(self) -> AsyncIterator[Session]:
        """Lend a connection for a query that may take long, such as a count of a million tasks.

        Searches hold at most SEARCHES connections, so claims and commits never wait for them.
        """
        try:
            async with asyncio.timeout(STATEMENT_SECONDS):
                await self._searches.acquire()
        except TimeoutError as error:
            raise QueueUnavailable from error
        try:
            async with self.session(reads_only=True) as session:
                yield session
        finally:
            self._searches.release()

    @contextlib.asynccontextmanager
    async def transaction(self) -> AsyncIterator[Session]:
        """Lend a connection in a transaction, which is committed when the block ends."""
        with self.outages.watch(), _translate_errors() as commit:
            async with (
                self._opened().acquire(timeout=CONNECT_SECONDS) as session,
                session.transaction(),
            ):
                with _note_misuse(session, commit):
                    yield session
                commit.may_be_sent = True

    def _opened(self) -> "asyncpg.Pool[Any]":
        if self._connections is None:
            raise QueueUnavailable("The queue is not running.")
        return self._connections


async def _skip_reset(_: Session) -> None:
    """Skip the reset of a connection that returns to the pool, which would cost a round trip.

    Nothing needs a reset, because no statement of the engine changes the state of a session.
    """


@dataclass(slots=True)
class _Commit:
    may_be_sent: bool = False
    is_misuse: bool = False


@contextlib.contextmanager
def _note_misuse(session: Session, commit: _Commit) -> Iterator[None]:
    """Note that an InterfaceError on an open connection is a bug of the caller, and no outage.

    asyncpg raises it for a closed connection too, and for two statements at once or a wrong number
    of parameters.
    """
    try:
        yield
    except asyncpg.InterfaceError:
        commit.is_misuse = not session.is_closed()
        raise


@contextlib.contextmanager
def _translate_errors() -> Iterator[_Commit]:
    """Raise errors of the database as DiskFull, CommitUnknown or QueueUnavailable."""
    commit = _Commit()
    try:
        yield commit
    except asyncpg.DiskFullError as error:
        raise DiskFull from error
    except DATABASE_ERRORS as error:
        if commit.is_misuse or is_statement_error(error):
            raise
        # The server may have committed if the connection broke before its reply arrived.
        if commit.may_be_sent and not is_rolled_back(error):
            raise CommitUnknown from error
        raise QueueUnavailable from error
