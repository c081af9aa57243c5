"""What the API's tests share: the service in this process, or as a process of its own."""

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
    """Run the tests of a module that names ENGINES with each of them."""
    engines = getattr(metafunc.module, "ENGINES", None)
    if engines and {"client", "idle_client"} & set(metafunc.fixturenames):
        metafunc.parametrize("queue_url", engines, indirect=True)


@pytest.fixture
def queue_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database: on SQLite, unless something else is asked for."""
    if getattr(request, "param", "sqlite") == "postgresql":
        return str(request.getfixturevalue("database_url"))
    return f"sqlite:///{tmp_path}/queue.db"


@pytest.fixture
def client(tmp_path: Path, queue_url: str) -> Iterator[TestClient]:
    """A client of a service of its own, whose data is in `tmp_path`."""
    settings = settings_in(tmp_path, queue_url=queue_url, max_upload_bytes=MAX_UPLOAD_BYTES)
    with TestClient(create_app(settings), follow_redirects=False) as client:
        yield client


@pytest.fixture
def idle_client(tmp_path: Path, queue_url: str) -> Iterator[TestClient]:
    """The same without a worker: what is queued stays queued."""
    settings = settings_in(tmp_path, queue_url=queue_url, worker_concurrency=0)
    with TestClient(create_app(settings), follow_redirects=False) as client:
        yield client


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A real server, shared by many tests: none may rely on what is there already."""
    directory = tmp_path_factory.mktemp("service")
    with Service(directory, max_upload_bytes=MAX_UPLOAD_BYTES) as service:
        yield service
