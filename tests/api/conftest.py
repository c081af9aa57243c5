"""What the API's tests share: the service in this process, or as a process of its own."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from app.main import create_app
from tests.api.requests import MAX_UPLOAD_BYTES
from tests.support.service import Service, settings_in


@pytest.fixture
def client(tmp_path: Path) -> Iterator[TestClient]:
    """A client of a service of its own, whose data is in `tmp_path`."""
    settings = settings_in(tmp_path, max_upload_bytes=MAX_UPLOAD_BYTES)
    with TestClient(create_app(settings), follow_redirects=False) as client:
        yield client


@pytest.fixture
def idle_client(tmp_path: Path) -> Iterator[TestClient]:
    """The same without a worker: what is queued stays queued."""
    settings = settings_in(tmp_path, worker_concurrency=0)
    with TestClient(create_app(settings), follow_redirects=False) as client:
        yield client


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A real server, shared by many tests: none may rely on what is there already."""
    directory = tmp_path_factory.mktemp("service")
    with Service(directory, max_upload_bytes=MAX_UPLOAD_BYTES) as service:
        yield service
