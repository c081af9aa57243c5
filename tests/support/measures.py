"""How much memory and processor a server takes, and how long others wait meanwhile."""

import math
import os
import threading
import time
from pathlib import Path
from typing import Self

import httpx2

MB = 1_000_000


def most_megabytes(pid: int) -> float:
    """What a process has taken at most so far."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024 / MB


class Peak:
    """By how much a process's memory grows at most, from now on."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        Path(f"/proc/{pid}/clear_refs").write_text("5")  # forget the peak so far (proc(5))
        self._before = most_megabytes(pid)

    @property
    def grown(self) -> float:
        """Megabytes."""
        return most_megabytes(self._pid) - self._before


class Pulse:
    """Asks again and again whether a service lives: on one connection, or `anew` each time."""

    def __init__(self, url: str, *, anew: bool = False) -> None:
        self._url = f"{url}/livez"
        self._anew = anew
        self._done = threading.Event()
        self._asking = threading.Thread(target=self._ask)
        self.seconds: list[float] = []

    def __enter__(self) -> Self:
        """Begin."""
        self._asking.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Ask no more."""
        self._done.set()
        self._asking.join()
        assert self.seconds

    def _ask(self) -> None:
        with httpx2.Client(timeout=60) as client:
            while not self._done.wait(0.05 if self._anew else 0.005):
                began = time.monotonic()
                (httpx2 if self._anew else client).get(self._url).raise_for_status()
                self.seconds.append(time.monotonic() - began)

    @property
    def p99(self) -> float:
        """What 99 of 100 answers took at most, in seconds."""
        return sorted(self.seconds)[math.ceil(len(self.seconds) * 0.99) - 1]


def idle_p99(url: str) -> float:
    """The same while nothing happens, at least to this service: what the machine is good for."""
    with Pulse(url) as pulse:
        time.sleep(0.5)
    return pulse.p99


def cpu_share(pid: int, seconds: float) -> float:
    """How much of a processor a process takes, over so many seconds."""

    def used() -> float:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    before = used()
    time.sleep(seconds)
    return (used() - before) / seconds
