"""A disk that loses its power, or fails. Data that had not reached it is lost.

with Disk(tmp_path) as disk:
    with Service(tmp_path, **settings_on(disk)) as service:
        ...
        disk.cut()
        service.kill()
        disk.power_on()
        service.start()
"""

import contextlib
import fcntl
import os
import random
import sqlite3
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Self

import httpx2

from tests.support.service import PATIENCE, Service, until
from tests.support.tools import skip_or_fail, tool

CLIENTS = 8

# EXT4_IOC_SHUTDOWN (linux/fs/ext4/ext4.h) is _IOR('X', 125, __u32).
_SHUTDOWN = 0x8004587D
_WITHOUT_FLUSH = struct.pack("I", 2)


class Disk:
    """An ext4 file system on a loop device, mounted at `folder`. Its image is in memory.

    `cut` simulates a power cut exactly: the kernel drops all unwritten data from its page cache and
    from the file system's journal. Killing a process would lose none of that. The model takes for
    granted that a disk keeps all data that it was told to flush.
    """

    def __init__(self, directory: Path, *, megabytes: int = 256) -> None:
        self.folder = directory / "disk"
        self._memory = directory / "memory"
        self._image = self._memory / "image"
        self._size = megabytes << 20

    def __enter__(self) -> Self:
        """Create and mount the disk. Where that is impossible, skip the test, or fail it in CI."""
        make = tool("mkfs.ext4")
        if os.geteuid():
            skip_or_fail("only root may mount a disk of its own")
        self.folder.mkdir()
        self._memory.mkdir()
        with contextlib.ExitStack() as undo:
            # Lazily, because a killed process may take a moment to close its files.
            try:
                _run("mount", "-t", "tmpfs", "tmpfs", self._memory)
                undo.callback(_run, "umount", "--lazy", self._memory)
                with self._image.open("wb") as image:
                    image.truncate(self._size)
                _run(make, "-q", "-J", "size=8", self._image)
                self._mount()
            except subprocess.CalledProcessError as error:
                skip_or_fail(f"no disk can be mounted here: {error.stderr.decode().strip()}")
            undo.callback(_run, "umount", "--lazy", self.folder)
            self._undo = undo.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        """Unmount the disk, and delete its image."""
        self._undo.close()

    def _mount(self) -> None:
        _run("mount", "-o", "loop", self._image, self.folder)

    def cut(self) -> None:
        """Cut the power. From now on nothing reaches the disk, and its users get EIO."""
        with _opened(self.folder) as folder:
            fcntl.ioctl(folder, _SHUTDOWN, _WITHOUT_FLUSH)

    def power_on(self) -> None:
        """Mount the disk as it was at the cut. Its users must have ended.

        ext4 replays its journal at the mount.
        """
        copy = self._image.with_name("copy")
        # Copy before the unmount, because the unmount may write to the old image.
        _run("cp", "--sparse=always", self._image, copy)
        _run("umount", self.folder)
        copy.replace(self._image)
        self._mount()

    def fail(self) -> None:
        """Make writes to free blocks fail: the data is lost, and fsync reports the error.

        This imitates a thinly provisioned disk: its blocks come from a pool, and the pool is empty.
        """
        with self._image.open("rb+") as image:
            os.posix_fallocate(image.fileno(), 0, self._size)
        _run("fstrim", self.folder)  # returns all unused blocks
        # A loop device reports a short write as complete. So limit each write to one block, which
        # succeeds or fails as a whole.
        device = self.folder.stat().st_dev
        limit = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/queue/max_sectors_kb")
        limit.write_text("4")
        used = self._image.stat().st_blocks * 512
        _run("mount", "-o", f"remount,size={used + 16_384}", self._memory)

    def mend(self) -> None:
        """Undo `fail`: later writes reach the disk again."""
        _run("mount", "-o", "remount,size=50%", self._memory)


def settings_on(disk: Disk) -> dict[str, Any]:
    """Return settings that put the database and the uploads on the disk, and nothing else."""
    return {
        "queue_url": f"sqlite:///{database_on(disk)}",
        "upload_url": f"file:{disk.folder}/uploads",
        "catcher": False,
    }


def database_on(disk: Disk) -> Path:
    """Return the path of the database of a service with these settings."""
    return disk.folder / "var" / "queue.db"


def inspect_database(disk: Disk) -> tuple[str, set[str], set[str]]:
    """Return SQLite's integrity verdict, the task ids, and the idempotency keys with an answer."""
    uri = f"{database_on(disk).as_uri()}?mode=ro"  # leave the recovery to the service
    with closing(sqlite3.connect(uri, uri=True)) as database:
        try:
            (verdict,) = database.execute("PRAGMA integrity_check").fetchone()
            tasks, keys = (
                {value for (value,) in database.execute(statement)}
                for statement in ("SELECT id FROM tasks", "SELECT key FROM answers")
            )
        except sqlite3.OperationalError as error:  # for example: the tables do not exist yet
            return str(error), set(), set()
    return verdict, tasks, keys


def cut_under_load(
    disk: Disk, service: Service, post: Callable[[httpx2.Client], tuple[str, str] | None]
) -> dict[str, str]:
    """Cut the power at a random instant while many clients post, then restore it.

    `post` returns a name and a value for an accepted request, or None. Return these pairs for all
    requests accepted before the cut. The service has been killed by then.
    """
    accepted: dict[str, str] = {}
    with _load(service.url, post, accepted):
        until(lambda: accepted, within=PATIENCE)
        time.sleep(random.uniform(0, 0.3))
        before = accepted.copy()
        disk.cut()
        service.kill()
    disk.power_on()
    return before


@contextmanager
def _load(
    url: str, post: Callable[[httpx2.Client], tuple[str, str] | None], accepted: dict[str, str]
) -> Iterator[None]:
    stop_posting = threading.Event()

    def keep_posting() -> None:
        with (
            httpx2.Client(base_url=url, timeout=10) as client,
            contextlib.suppress(httpx2.TransportError),  # killed before it answered: no promise
        ):
            while not stop_posting.is_set():
                if pair := post(client):
                    accepted.update([pair])

    clients = [threading.Thread(target=keep_posting) for _ in range(CLIENTS)]
    for client in clients:
        client.start()
    try:
        yield
    finally:
        stop_posting.set()
        for client in clients:
            client.join()


@contextmanager
def _opened(folder: Path) -> Iterator[int]:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _run(*command: object) -> None:
    subprocess.run([str(part) for part in command], check=True, capture_output=True)
