"""A wall clock that a test sets while the service runs (libfaketime).

The monotonic clock stays right, so timeouts and sleeps take their real time.
"""

from pathlib import Path
from typing import Any

from tests.support.tools import skip_or_fail


class FakeClock:
    """The wall clock of every process that is started with `settings`. At first it is right."""

    def __init__(self, directory: Path) -> None:
        self._file = directory / "clock"
        self.set(days=0)
        self.settings: dict[str, Any] = {
            "ld_preload": _library(),
            "faketime_timestamp_file": self._file,
            "faketime_no_cache": 1,
            "faketime_dont_fake_monotonic": 1,
            "faketime_force_monotonic_fix": 0,  # otherwise waits for a lock take too long
        }

    def set(self, *, days: int) -> None:
        """Set the clock this many days ahead, or behind with a negative number."""
        new = self._file.with_suffix(".new")
        new.write_text(f"{days:+d}d\n")
        new.rename(self._file)


def _library() -> Path:
    found = [*Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1")]
    return found[0] if found else skip_or_fail("libfaketime is not installed")
