"""What the attacks share: a service to attack, which must not be moved."""

from collections.abc import Iterator

import pytest

from tests.support.target import Target, attacked


@pytest.fixture(scope="session")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    """A real server for many modules: no test may rely on what is there already."""
    with attacked(tmp_path_factory.mktemp("target")) as target:
        yield target


@pytest.fixture
def unmoved(target: Target) -> Iterator[None]:
    """The test leaves no task, no file and no byte of SMTP."""
    with target.unmoved():
        yield
