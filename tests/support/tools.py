"""Optional programs and scripts. Without one, its tests are skipped on a laptop, and fail in CI."""

import os
import shutil
from pathlib import Path
from typing import NoReturn

import pytest


def tool(name: str) -> str:
    """Return the path of a program. If it is not installed, skip the test or fail it in CI."""
    search = os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/sbin"])
    return shutil.which(name, path=search) or skip_or_fail(f"{name} is not installed")


def script_from_npm(path: str) -> str:
    """Return a script of an npm package in NODE_PATH, where Node.js itself looks for packages.

    If it is not installed, skip the test or fail it in CI.
    """
    directories = filter(None, os.environ.get("NODE_PATH", "").split(os.pathsep))
    found = [script for name in directories if (script := Path(name, path)).is_file()]
    return found[0].read_text() if found else skip_or_fail(f"{path} is not in NODE_PATH")


def skip_or_fail(why: str) -> NoReturn:
    """Skip this test, or in CI fail it, with the reason `why`."""
    if os.environ.get("CI"):  # CI may be set to an empty string, which counts as unset
        pytest.fail(why)
    pytest.skip(why)
