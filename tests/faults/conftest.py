"""What some of the faults share: an SMTP server to misbehave, and a mailer to suffer it; databases.

`engine` is a started engine, whose database takes the time from those who ask it; `queue_url` a
database as the service has it.
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
    """An empty database of each engine in turn, for processes of their own."""
    return str(request.getfixturevalue(request.param))
