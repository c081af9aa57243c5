"""The permissions of the log file that courtesies append lines to."""

import stat
from pathlib import Path

from app.tasks.log_file import LogFile


def test_only_the_service_can_read_the_log_file(tmp_path: Path) -> None:
    log_file = LogFile(tmp_path / "logs" / "log.txt")
    log_file.append("Hello")
    log_file.close()
    modes = [stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "logs").rglob("*")]
    assert modes == [0o600]
    assert stat.S_IMODE((tmp_path / "logs").stat().st_mode) == 0o700
