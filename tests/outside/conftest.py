"""Programs that others wrote: a laptop may lack them, CI may not."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest

from tests.support.postfix import Postfix


def program(name: str) -> str:
    """The path of a program; where it is missing, the test is skipped, but in CI it fails."""
    search = os.pathsep.join([os.environ["PATH"], "/usr/sbin"])
    path = shutil.which(name, path=search)
    return str(Path(path)) if path else _missing(f"{name} is not installed")


def _missing(what: str) -> NoReturn:
    if "CI" in os.environ:
        pytest.fail(what)
    pytest.skip(what)


@pytest.fixture
def chromium() -> str:
    """Debian's Chromium."""
    return program("chromium")


@pytest.fixture
def smtp_sink() -> str:
    """Postfix's SMTP server for tests, which takes any mail."""
    return program("smtp-sink")


@pytest.fixture(scope="module")
def postfix() -> Iterator[Postfix]:
    """A Postfix of our own, as strict as it can be."""
    path = program("postfix")
    if os.geteuid() != 0:
        _missing("Postfix needs root, which we are not")
    with Postfix(path) as postfix:
        yield postfix


@pytest.fixture(scope="module")
def swaks() -> str:
    """The Swiss Army Knife for SMTP, a client that does what it is told."""
    return program("swaks")


@pytest.fixture
def maildev() -> str:
    """An SMTP server for development, from npm."""
    return program("maildev")


@pytest.fixture(scope="module")
def nginx() -> str:
    """A web server, as a proxy."""
    return program("nginx")
