"""Fixtures for the fault tests: SMTP servers, mailers and databases.

`engine` is a started engine. Its database uses the time that a test passes in, and not a clock of
its own. `queue_url` is a database for the service, with its own clock.
"""

import pytest

from tests.library.conftest import (
    clock,
    engine,
    engine_url,
    frequent_polls,
    postgresql_url,
    sqlite_url,
    time_machine_url,
)
from tests.support.mails import mailer_to, server
from tests.support.postgres import sql

__all__ = [
    "clock",
    "engine",
    "engine_url",
    "frequent_polls",
    "mailer_to",
    "postgresql_url",
    "server",
    "sql",
    "sqlite_url",
    "time_machine_url",
]


@pytest.fixture(params=["sqlite_url", "database_url"], ids=["sqlite", "postgresql"])
def queue_url(request: pytest.FixtureRequest) -> str:
    """The URL of an empty SQLite or PostgreSQL database, for separate processes."""
    return str(request.getfixturevalue(request.param))
