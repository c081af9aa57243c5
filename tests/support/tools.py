"""Optional programs. Without one, its tests are skipped on a laptop, and fail in CI."""

import os
import shutil
from typing import NoReturn

import pytest


def tool(name: str) -> str:
    """Return the path of a program. If it is not installed, skip the test or fail it in CI."""
    search = os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/sbin"])
    return shutil.which(name, path=search) or skip_or_fail(f"{name} is not installed")


def skip_or_fail(why: str) -> NoReturn:
    """Skip this test, or in CI fail it, with the reason `why`."""
    if os.environ.get("CI"):  # CI may be set to an empty string, which counts as unset
        pytest.fail(why)
    pytest.skip(why)
