"""Fixtures for the attacks: a service to attack, and a check that it is unchanged afterwards."""

from collections.abc import Iterator

import pytest

from tests.support.target import Target, attacked


@pytest.fixture(scope="session")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    """A real server for many modules. A test must not rely on the tasks and files in it."""
    with attacked(tmp_path_factory.mktemp("target")) as target:
        yield target


@pytest.fixture
def leaves_no_traces(target: Target) -> Iterator[None]:
    """Check that the test adds no task and no file, and causes no byte of SMTP."""
    with target.unmoved():
        yield
