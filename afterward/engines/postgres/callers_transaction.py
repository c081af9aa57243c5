"""Write a task through the caller's own connection, as a part of the caller's own transaction."""

import inspect
from dataclasses import asdict
from typing import Any

import asyncpg
from asyncpg.pool import PoolConnectionProxy

from afterward.engines.postgres.statements import TASKS_CHANNEL
from afterward.task import TASK_FIELDS, Task, to_json

_COLUMNS = ", ".join(TASK_FIELDS)
# The task is one JSON text, which PostgreSQL converts to the types of the table. So the caller's
# codecs for numbers, arrays and JSON never see it, and it is ASCII in every client encoding. Tables
# and functions are named with their schema, because the caller's search_path may lead elsewhere.
_INSERT = f"""
    WITH woken AS (SELECT pg_catalog.pg_notify('{TASKS_CHANNEL}', ''))
    INSERT INTO afterward.tasks ({_COLUMNS}, ready_at)
    SELECT {_COLUMNS}, pg_catalog.now() + (due_at - updated_at) * interval '1 second'
    FROM woken, pg_catalog.json_populate_record(
        NULL::afterward.tasks, $1::text::json
    )
"""

_ACCEPTED = (
    "an asyncpg connection, or SQLAlchemy's AsyncConnection or AsyncSession on postgresql+asyncpg"
)
_NO_TRANSACTION = (
    "The connection is in no transaction, so PostgreSQL would commit the task by itself. Write "
    "your rows and add the task within one transaction: "
)


async def insert_through(connection: object, task: Task) -> None:
    """Insert a task through a connection that is in a transaction, and notify the workers.

    PostgreSQL delivers the notification when the caller commits. Nothing here commits, rolls back,
    or changes a setting of the connection. Raises TypeError for a connection of another kind,
    RuntimeError for a connection in no transaction, and the errors of the database as the
    connection raises them.
    """
    document = to_json(asdict(task))
    if isinstance(connection, asyncpg.Connection | PoolConnectionProxy):
        if not connection.is_in_transaction():
            raise RuntimeError(_NO_TRANSACTION + "`async with connection.transaction(): ...`.")
        await connection.execute(_INSERT, document)
        return
    sqlalchemy = await _sqlalchemy_connection(connection)
    # SQLAlchemy sends BEGIN together with the first statement that it is given. A statement on the
    # driver's connection beneath it could come before that, and would be committed at once.
    await sqlalchemy.exec_driver_sql(_INSERT, (document,))


async def _sqlalchemy_connection(given: Any) -> Any:
    """Return SQLAlchemy's AsyncConnection of a session, or the one that was given.

    SQLAlchemy is no dependency of the library, so its objects are known by their methods.
    """
    if not hasattr(given, "get_raw_connection"):
        # A session that is not asynchronous has this method too, but as a plain function.
        if not inspect.iscoroutinefunction(getattr(given, "connection", None)):
            # With its module, because psycopg has an AsyncConnection too.
            kind = type(given)
            raise _not_accepted(f"{kind.__module__}.{kind.__qualname__}".removeprefix("builtins."))
        given = await given.connection()
    if given.dialect.driver != "asyncpg":
        raise _not_accepted(f"SQLAlchemy's connection on {given.dialect.driver}")
    raw = await given.get_raw_connection()
    if raw.dbapi_connection.autocommit:
        raise RuntimeError(_NO_TRANSACTION + "use an isolation level other than AUTOCOMMIT.")
    return given


def _not_accepted(found: str) -> TypeError:
    return TypeError(f"A task can be added through {_ACCEPTED}, not through {found}.")
