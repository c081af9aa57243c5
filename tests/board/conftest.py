"""Fixtures for the tests of the dashboard: a browser in front of the service in this process."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from tests.support.gate import served
from tests.support.pages import BROWSER


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[TestClient]:
    """A browser in front of a service without API keys."""
    with served(tmp_path) as client:
        client.headers.update(BROWSER)
        yield client


@pytest.fixture
def idle_browser(tmp_path: Path) -> Iterator[TestClient]:
    """A browser in front of a service without a worker: queued tasks stay queued."""
    with served(tmp_path, worker_concurrency=0) as client:
        client.headers.update(BROWSER)
        yield client
