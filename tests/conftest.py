"""What every test shares."""

from collections.abc import Iterator

import pytest
from anyio.from_thread import start_blocking_portal

from tests.support.smtp_server import SmtpServer


@pytest.fixture(params=["asyncio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    """The service runs on asyncio, and so do its tests."""
    return str(request.param)


@pytest.fixture
def smtp_server() -> Iterator[SmtpServer]:
    """An SMTP server that takes everything, until it is told otherwise."""
    with (
        start_blocking_portal() as portal,
        portal.wrap_async_context_manager(SmtpServer()) as server,
    ):
        yield server
