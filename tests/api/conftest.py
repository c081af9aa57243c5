"""Fixtures for the tests of the API: the service in this process, or as a separate process."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from app.main import create_app
from tests.api.requests import MAX_UPLOAD_BYTES
from tests.support.postgres import sql
from tests.support.service import Service, settings_in

__all__ = ["sql"]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """If a module has a list ENGINES, run its tests with each of these engines."""
    engines = getattr(metafunc.module, "ENGINES", None)
    if engines and {"client", "idle_client"} & set(metafunc.fixturenames):
        metafunc.parametrize("queue_url", engines, indirect=True)


@pytest.fixture
def queue_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of an empty database: SQLite, unless the test has PostgreSQL as a parameter."""
    if getattr(request, "param", "sqlite") == "postgresql":
        return str(request.getfixturevalue("database_url"))
    return f"sqlite:///{tmp_path}/queue.db"


@pytest.fixture
def client(tmp_path: Path, queue_url: str) -> Iterator[TestClient]:
    """A client of a new service with its data in `tmp_path`."""
    settings = settings_in(tmp_path, queue_url=queue_url, max_upload_bytes=MAX_UPLOAD_BYTES)
    with TestClient(create_app(settings), follow_redirects=False) as client:
        yield client


@pytest.fixture
def idle_client(tmp_path: Path, queue_url: str) -> Iterator[TestClient]:
    """A client of a service without a worker: queued tasks stay queued."""
    settings = settings_in(tmp_path, queue_url=queue_url, worker_concurrency=0)
    with TestClient(create_app(settings), follow_redirects=False) as client:
        yield client


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A real server for many tests. A test must not rely on the tasks and files in it."""
    directory = tmp_path_factory.mktemp("service")
    with Service(directory, max_upload_bytes=MAX_UPLOAD_BYTES) as service:
        yield service
