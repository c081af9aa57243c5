"""Measure a server's memory, its use of the processor, and the latency of its answers."""

import math
import os
import threading
import time
from pathlib import Path
from typing import Self

import httpx2

MB = 1_000_000


def most_megabytes(pid: int) -> float:
    """Return the peak of a process's resident memory so far (VmHWM)."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024 / MB


class Peak:
    """Measures the growth of a process's peak memory from now on."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        Path(f"/proc/{pid}/clear_refs").write_text("5")  # resets the peak (proc(5))
        self._before = most_megabytes(pid)

    @property
    def grown(self) -> float:
        """The growth in megabytes."""
        return most_megabytes(self._pid) - self._before


class Pulse:
    """Measures the latency of /livez again and again.

    With `anew`, each request opens a new connection. Without it, all share one connection.
    """

    def __init__(self, url: str, *, anew: bool = False) -> None:
        self._url = f"{url}/livez"
        self._anew = anew
        self._done = threading.Event()
        self._asking = threading.Thread(target=self._ask)
        self.seconds: list[float] = []

    def __enter__(self) -> Self:
        """Start asking."""
        self._asking.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop asking."""
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
        """The 99th percentile of the latencies, in seconds."""
        return sorted(self.seconds)[math.ceil(len(self.seconds) * 0.99) - 1]


def idle_p99(url: str) -> float:
    """Return the 99th percentile of an idle service, in seconds, as this machine's baseline."""
    with Pulse(url) as pulse:
        time.sleep(0.5)
    return pulse.p99


def cpu_share(pid: int, seconds: float) -> float:
    """Measure a process for `seconds`; return its processor time per second (1.0 is one core)."""

    def used() -> float:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    before = used()
    time.sleep(seconds)
    return (used() - before) / seconds
