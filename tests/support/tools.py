"""Programs that a machine may lack: a laptop skips their tests and says why; in CI they fail."""

import os
import shutil
from typing import NoReturn

import pytest


def tool(name: str) -> str:
    """The path of a program, or see `not_here`."""
    search = os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/sbin"])
    return shutil.which(name, path=search) or not_here(f"{name} is not installed")


def not_here(why: str) -> NoReturn:
    """Skip this test; in CI, fail it."""
    if os.environ.get("CI"):  # which may be set, and empty
        pytest.fail(why)
    pytest.skip(why)
