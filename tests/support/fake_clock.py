"""A process whose clock can be set while it runs, by libfaketime; how long things take is true."""

from pathlib import Path
from typing import Any

from tests.support.tools import not_here


class FakeClock:
    """The clock of those who are started with `settings`; at first it is right."""

    def __init__(self, directory: Path) -> None:
        self._file = directory / "clock"
        self.set(days=0)
        self.settings: dict[str, Any] = {
            "ld_preload": _library(),
            "faketime_timestamp_file": self._file,
            "faketime_no_cache": 1,
            "faketime_dont_fake_monotonic": 1,
            "faketime_force_monotonic_fix": 0,  # else whoever waits for a lock waits for long
        }

    def set(self, *, days: int) -> None:
        """Let it be so many days fast, or slow if there are less than none."""
        new = self._file.with_suffix(".new")
        new.write_text(f"{days:+d}d\n")
        new.rename(self._file)


def _library() -> Path:
    found = [*Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1")]
    return found[0] if found else not_here("libfaketime is not installed")
