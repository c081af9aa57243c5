"""A disk whose power can be cut, and which can fail: what had not reached it is gone.

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
from tests.support.tools import not_here, tool

CLIENTS = 8

# EXT4_IOC_SHUTDOWN (linux/fs/ext4/ext4.h) is _IOR('X', 125, __u32).
_SHUTDOWN = 0x8004587D
_WITHOUT_FLUSH = struct.pack("I", 2)


class Disk:
    """An ext4 file system on a loop device, mounted at `folder`; its image is in memory.

    `cut` is exact: what the kernel has in its page cache, and has not yet written, is dropped, that
    of the file system's journal as well. A process that is killed loses nothing of that. That the
    disk keeps what it was told to flush is taken for granted.
    """

    def __init__(self, directory: Path, *, megabytes: int = 256) -> None:
        self.folder = directory / "disk"
        self._memory = directory / "memory"
        self._image = self._memory / "image"
        self._size = megabytes << 20

    def __enter__(self) -> Self:
        """Make it and mount it; skip the test where that is not possible, but in CI fail it."""
        make = tool("mkfs.ext4")
        if os.geteuid():
            not_here("only root may mount a disk of its own")
        self.folder.mkdir()
        self._memory.mkdir()
        with contextlib.ExitStack() as undo:
            # Lazily: what was killed may take a moment to let go of its files.
            try:
                _run("mount", "-t", "tmpfs", "tmpfs", self._memory)
                undo.callback(_run, "umount", "--lazy", self._memory)
                with self._image.open("wb") as image:
                    image.truncate(self._size)
                _run(make, "-q", "-J", "size=8", self._image)
                self._mount()
            except subprocess.CalledProcessError as error:
                not_here(f"no disk can be mounted here: {error.stderr.decode().strip()}")
            undo.callback(_run, "umount", "--lazy", self.folder)
            self._undo = undo.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        """Unmount it, with all that is on it."""
        self._undo.close()

    def _mount(self) -> None:
        _run("mount", "-o", "loop", self._image, self.folder)

    def cut(self) -> None:
        """Cut the power: from this instant on nothing reaches the disk, and its users get EIO."""
        with _opened(self.folder) as folder:
            fcntl.ioctl(folder, _SHUTDOWN, _WITHOUT_FLUSH)

    def power_on(self) -> None:
        """Mount what was on the disk, which makes its journal good; its users must have ended."""
        copy = self._image.with_name("copy")
        _run("cp", "--sparse=always", self._image, copy)  # now: nothing of the old one counts
        _run("umount", self.folder)
        copy.replace(self._image)
        self._mount()

    def fail(self) -> None:
        """Let it fail: whatever goes to a place that was free is lost, and its fsync says so.

        The disk is a thin one, whose blocks come from somewhere else, where there are none left.
        """
        with self._image.open("rb+") as image:
            os.posix_fallocate(image.fileno(), 0, self._size)
        _run("fstrim", self.folder)  # gives back all but what holds something
        # A loop device takes a write that was cut short for a whole one: so, one block at a time.
        device = self.folder.stat().st_dev
        limit = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/queue/max_sectors_kb")
        limit.write_text("4")
        used = self._image.stat().st_blocks * 512
        _run("mount", "-o", f"remount,size={used + 16_384}", self._memory)

    def mend(self) -> None:
        """Take that back: what is written from now on is kept."""
        _run("mount", "-o", "remount,size=50%", self._memory)


def settings_on(disk: Disk) -> dict[str, Any]:
    """The settings of a service whose database and uploads are on the disk, and nothing else."""
    return {
        "queue_url": f"sqlite:///{database_on(disk)}",
        "upload_url": f"file:{disk.folder}/uploads",
        "catcher": False,
    }


def database_on(disk: Disk) -> Path:
    """The database of such a service."""
    return disk.folder / "var" / "queue.db"


def look_into(disk: Disk) -> tuple[str, set[str], set[str]]:
    """What SQLite says of the database; its tasks, and the keys it has answers for."""
    uri = f"{database_on(disk).as_uri()}?mode=ro"  # the service itself is to bring it in order
    with closing(sqlite3.connect(uri, uri=True)) as database:
        try:
            (verdict,) = database.execute("PRAGMA integrity_check").fetchone()
            tasks, keys = (
                {value for (value,) in database.execute(statement)}
                for statement in ("SELECT id FROM tasks", "SELECT key FROM answers")
            )
        except sqlite3.OperationalError as error:  # not even its tables were there
            return str(error), set(), set()
    return verdict, tasks, keys


def cut_under_load(
    disk: Disk, service: Service, post: Callable[[httpx2.Client], tuple[str, str] | None]
) -> dict[str, str]:
    """Cut the power at a random instant while many clients post, and switch it on again.

    `post` gives what was accepted, a name and a value. Gives all that was accepted before the cut.
    The service has ended then.
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
    enough = threading.Event()

    def keep_posting() -> None:
        with (
            httpx2.Client(base_url=url, timeout=10) as client,
            contextlib.suppress(httpx2.TransportError),  # the power was cut: nothing promised
        ):
            while not enough.is_set():
                if taken := post(client):
                    accepted.update([taken])

    clients = [threading.Thread(target=keep_posting) for _ in range(CLIENTS)]
    for client in clients:
        client.start()
    try:
        yield
    finally:
        enough.set()
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
