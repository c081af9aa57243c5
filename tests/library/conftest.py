"""Fixtures for the tests of the library: each engine in turn, and a clock that tests set."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from afterward import worker as worker_module
from afterward.engine import Engine
from tests.library import time_machine
from tests.library.support import Clock
from tests.support.postgres import Postgres, sql, with_tables

__all__ = ["sql"]


@pytest.fixture(params=["sqlite", "postgresql"])
def engine_url(request: pytest.FixtureRequest) -> str:
    """The URL of an empty database, for each engine in turn. A new engine adds its name here."""
    return str(request.getfixturevalue(f"{request.param}_url"))


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/queue.db"


@pytest.fixture(scope="session")
def time_machine_url(postgres: Postgres) -> str:
    """The address of a database with the service's tables and the tables of the time machine."""
    url = with_tables(postgres)
    postgres.sql(time_machine.INSTALL, url)
    return url


@pytest.fixture
def postgresql_url(postgres: Postgres, time_machine_url: str) -> str:
    postgres.empty(time_machine_url)
    return time_machine_url + time_machine.ENTRANCE


@pytest.fixture
async def engine(engine_url: str) -> AsyncIterator[Engine]:
    """A started engine; its database takes the time from the argument `now` of each call."""
    engine = time_machine.opened(engine_url)
    await engine.start()
    yield engine
    await engine.stop()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def frequent_polls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let workers poll every 20 ms, so that a test need not wait for a retry."""
    monkeypatch.setattr(worker_module, "POLL_SECONDS", 0.02)
