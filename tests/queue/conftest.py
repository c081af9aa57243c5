"""What the queue's tests share: every engine in turn, and a clock."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from app.queue.engine import Engine, open_engine
from tests.queue.support import Clock


@pytest.fixture(params=["sqlite"])
def engine_url(request: pytest.FixtureRequest) -> str:
    """An empty database for each engine in turn. A new engine is one more name, and its URL."""
    return str(request.getfixturevalue(f"{request.param}_url"))


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/queue.db"


@pytest.fixture
async def engine(engine_url: str) -> AsyncIterator[Engine]:
    """A started engine."""
    engine = open_engine(engine_url)
    await engine.start()
    yield engine
    await engine.stop()


@pytest.fixture
def clock() -> Clock:
    return Clock()
