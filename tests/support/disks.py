"""Disks that fill up, directories that cannot be written, and root refused as anybody is."""

import contextlib
import os
import resource
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

# Before a command: root without its capabilities, whom permissions bind as they bind everybody.
UNPRIVILEGED = () if os.geteuid() else ("setpriv", "--bounding-set=-all", "--inh-caps=-all")


class Disk(Protocol):
    """Something to keep files on that can be full for a process, and free again."""

    name: str
    directory: Path

    def fill(self, pid: int) -> None:
        """Leave no room for what this process would write."""
        ...

    def free(self, pid: int) -> None:
        """Take that back."""
        ...


class SmallDisk:
    """A file system of a few megabytes in memory, for real; only root can have one."""

    name = "tmpfs"

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._ballast = directory / "ballast"

    def fill(self, pid: int) -> None:  # noqa: ARG002 - it is full for everybody
        """Fill it up to its last page; see Disk."""
        with self._ballast.open("ab", buffering=0) as ballast:
            for size in (65_536, 4_096):
                with contextlib.suppress(OSError):
                    while True:
                        ballast.write(bytes(size))

    def free(self, pid: int) -> None:  # noqa: ARG002
        """Take the ballast away; see Disk."""
        self._ballast.unlink()


class LimitedFiles:
    """A limit on how large the files of a process may become: nothing may be written at all."""

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
    """A SmallDisk at `directory`; None where the system does not let us mount one."""
    directory.mkdir()
    mounting = ("mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(directory))
    possible = not os.geteuid() and shutil.which("mount")
    if not possible or subprocess.run(mounting, capture_output=True, check=False).returncode:
        yield None
        return
    try:
        yield SmallDisk(directory)
    finally:
        # Lazily: what is killed may take a moment to let go of its files.
        subprocess.run(("umount", "--lazy", str(directory)), check=True)


@contextmanager
def read_only(directory: Path, *, but: Path | None = None) -> Iterator[None]:
    """Let nobody write in this directory, nor in those in it `but` one; root is UNPRIVILEGED."""
    folders = [directory, *(path for path in directory.iterdir() if path.is_dir() and path != but)]
    modes = [folder.stat().st_mode for folder in folders]
    for folder in folders:
        folder.chmod(0o500)
    try:
        yield
    finally:
        for folder, mode in zip(folders, modes, strict=True):
            folder.chmod(mode)
