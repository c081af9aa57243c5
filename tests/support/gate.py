"""The service in this process, with settings for its API keys and other access checks."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fastapi.testclient import TestClient

from app.main import create_app
from tests.support.service import settings_in

MAIL_ROUTES = ["/send-notification/{}", "/send-email/?email={}", "/items/7?email={}"]


@contextmanager
def served(directory: Path, **settings: object) -> Iterator[TestClient]:
    """Yield a client of a service with its data in `directory`. It follows no redirects."""
    app = create_app(settings_in(directory, **settings))
    with TestClient(app, follow_redirects=False, raise_server_exceptions=False) as client:
        yield client


def bearing(key: str) -> dict[str, str]:
    """Return the Authorization header with this API key."""
    return {"Authorization": f"Bearer {key}"}
