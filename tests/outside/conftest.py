"""Programs that others wrote."""

import os
from collections.abc import Iterator

import pytest

from tests.support.postfix import Postfix
from tests.support.tools import skip_or_fail, tool


@pytest.fixture
def chromium() -> str:
    """Debian's Chromium."""
    return tool("chromium")


@pytest.fixture
def smtp_sink() -> str:
    """Postfix's SMTP server for tests, which takes any mail."""
    return tool("smtp-sink")


@pytest.fixture(scope="module")
def postfix() -> Iterator[Postfix]:
    """A Postfix of our own, as strict as it can be."""
    path = tool("postfix")
    if os.geteuid() != 0:
        skip_or_fail("Postfix needs root, which we are not")
    with Postfix(path) as postfix:
        yield postfix


@pytest.fixture(scope="module")
def swaks() -> str:
    """The Swiss Army Knife for SMTP, a client that does what it is told."""
    return tool("swaks")


@pytest.fixture
def maildev() -> str:
    """An SMTP server for development, from npm."""
    return tool("maildev")


@pytest.fixture(scope="module")
def nginx() -> str:
    """A web server, as a proxy."""
    return tool("nginx")
