"""Fixtures for third-party programs: browsers, SMTP servers and clients, a proxy, Prometheus."""

import os
from collections.abc import Iterator

import pytest

from tests.support.postfix import Postfix
from tests.support.tools import skip_or_fail, tool


@pytest.fixture
def chromium() -> str:
    """The path of Debian's Chromium."""
    return tool("chromium")


@pytest.fixture
def smtp_sink() -> str:
    """The path of smtp-sink, Postfix's test server, which accepts any mail."""
    return tool("smtp-sink")


@pytest.fixture(scope="module")
def postfix() -> Iterator[Postfix]:
    """A private Postfix with strict settings."""
    path = tool("postfix")
    if os.geteuid() != 0:
        skip_or_fail("Postfix needs root")
    with Postfix(path) as postfix:
        yield postfix


@pytest.fixture(scope="module")
def swaks() -> str:
    """The path of swaks, the Swiss Army Knife for SMTP, a scriptable client."""
    return tool("swaks")


@pytest.fixture
def maildev() -> str:
    """The path of maildev, an SMTP server for development, from npm."""
    return tool("maildev")


@pytest.fixture(scope="module")
def nginx() -> str:
    """The path of nginx, used as a proxy."""
    return tool("nginx")


@pytest.fixture(scope="module")
def promtool() -> str:
    """The path of promtool, which comes with Prometheus."""
    return tool("promtool")
