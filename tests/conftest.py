"""What every test shares."""

import pytest


@pytest.fixture(params=["asyncio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    """The service runs on asyncio, and so do its tests."""
    return str(request.param)
