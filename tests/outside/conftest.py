"""Programs that others wrote: a laptop may lack them, CI may not."""

import os
import shutil
from pathlib import Path

import pytest


def program(name: str) -> str:
    """The path of a program; where it is missing, the test is skipped, but in CI it fails."""
    search = os.pathsep.join([os.environ["PATH"], "/usr/sbin"])
    path = shutil.which(name, path=search)
    if path is None:
        assert "CI" not in os.environ, f"{name} must be installed here"
        pytest.skip(f"{name} is not installed")
    return str(Path(path))


@pytest.fixture
def chromium() -> str:
    """Debian's Chromium."""
    return program("chromium")


@pytest.fixture
def smtp_sink() -> str:
    """Postfix's SMTP server for tests, which takes any mail."""
    return program("smtp-sink")
