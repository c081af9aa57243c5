"""Full disks, read-only directories, and a root that file permissions bind."""

import contextlib
import os
import resource
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

# A prefix for a command. It takes root's capabilities away, because with them root may write to
# any file, whatever its permissions say.
UNPRIVILEGED = () if os.geteuid() else ("setpriv", "--bounding-set=-all", "--inh-caps=-all")


class Disk(Protocol):
    """A place for files that can be full for one process, and later has room again."""

    name: str
    directory: Path

    def fill(self, pid: int) -> None:
        """Make every further write of this process fail."""
        ...

    def free(self, pid: int) -> None:
        """Make room again."""
        ...


class SmallDisk:
    """A real file system of a few megabytes in memory (tmpfs). Only root can mount it."""

    name = "tmpfs"

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._ballast = directory / "ballast"

    def fill(self, pid: int) -> None:  # noqa: ARG002 - the disk is full for every process
        """Fill the disk up to its last page; see Disk."""
        with self._ballast.open("ab", buffering=0) as ballast:
            for size in (65_536, 4_096):
                with contextlib.suppress(OSError):
                    while True:
                        ballast.write(bytes(size))

    def free(self, pid: int) -> None:  # noqa: ARG002
        """Remove the ballast file; see Disk."""
        self._ballast.unlink()


class LimitedFiles:
    """Stands in for a full disk: RLIMIT_FSIZE of 0 lets a process write nothing to any file."""

    name = "RLIMIT_FSIZE"

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def fill(self, pid: int) -> None:
        """See Disk."""
        self._limit(pid, 0)

    def free(self, pid: int) -> None:
        """See Disk."""
        self._limit(pid, resource.RLIM_INFINITY)

    def _limit(self, pid: int, size: int) -> None:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


@contextmanager
def small_disk(directory: Path, megabytes: int = 32) -> Iterator[SmallDisk | None]:
    """Yield a SmallDisk at `directory`, or None where this process may not mount file systems."""
    directory.mkdir()
    mounting = ("mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(directory))
    possible = not os.geteuid() and shutil.which("mount")
    if not possible or subprocess.run(mounting, capture_output=True, check=False).returncode:
        yield None
        return
    try:
        yield SmallDisk(directory)
    finally:
        # Lazily, because a killed process may take a moment to close its files.
        subprocess.run(("umount", "--lazy", str(directory)), check=True)


@contextmanager
def read_only(directory: Path, *, but: Path | None = None) -> Iterator[None]:
    """Make this directory and its subdirectories read-only, except the subdirectory `but`.

    This binds root only if root's command begins with UNPRIVILEGED.
    """
    folders = [directory, *(path for path in directory.iterdir() if path.is_dir() and path != but)]
    modes = [folder.stat().st_mode for folder in folders]
    for folder in folders:
        folder.chmod(0o500)
    try:
        yield
    finally:
        for folder, mode in zip(folders, modes, strict=True):
            folder.chmod(mode)
