"""Machines of their own, each a network namespace of Linux with a cable to one switch."""

import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Self

import pytest

from tests.support.tools import not_here, tool

NETWORK = "198.18.77"  # of those set aside for tests between machines (RFC 2544)
SUBNET = f"{NETWORK}.0/24"
HERE = f"{NETWORK}.1"  # this machine's address


class Machine:
    """A machine at the switch; a command that begins with `within` runs on it."""

    def __init__(self, switch: str, number: int) -> None:
        self.address = f"{NETWORK}.{number + 1}"
        self._switch = switch
        self._name = f"{switch}-{number}"
        # Not `ip netns exec`: it also mounts, which fails where the root is no mount of its own.
        self.within = ("nsenter", f"--net=/run/netns/{self._name}")
        self._plug = f"{switch}p{number}"

    def __enter__(self) -> Self:
        """Set it up, and plug it in."""
        _ip("netns", "add", self._name)
        _ip("link", "add", self._plug, "type", "veth", "peer", "name", "eth0", "netns", self._name)
        for command in (
            ("link", "set", "lo", "up"),
            ("link", "set", "eth0", "up"),
            ("address", "add", f"{self.address}/24", "dev", "eth0"),
        ):
            subprocess.run((*self.within, "ip", *command), check=True)
        _ip("link", "set", self._plug, "up")
        self.plug_in()
        return self

    def __exit__(self, *_: object) -> None:
        """Take it away, and its cable with it."""
        _ip("netns", "delete", self._name)

    def plug_in(self) -> None:
        """Connect it with the others."""
        _ip("link", "set", self._plug, "master", self._switch)

    def unplug(self) -> None:
        """Cut it off, behind the next switch: nobody is told, packets just go nowhere."""
        _ip("link", "set", self._plug, "nomaster")


@contextmanager
def machines(count: int) -> Iterator[Sequence[Machine]]:
    """So many machines that reach each other, and this one at HERE."""
    _or_skip()
    switch = f"aft{os.getpid()}"
    _ip("link", "add", switch, "type", "bridge")
    try:
        _ip("address", "add", f"{HERE}/24", "dev", switch)
        _ip("link", "set", switch, "up")
        with ExitStack() as stack:
            yield [stack.enter_context(Machine(switch, number + 1)) for number in range(count)]
    finally:
        _ip("link", "delete", switch)


def _or_skip() -> None:
    """Skip where this cannot be: on a laptop; but in CI only where the kernel refuses."""
    tool("ip")
    if os.geteuid():
        not_here("network namespaces need root")
    probe = ("ip", "netns", "add", probed := f"aft{os.getpid()}-probe")
    tried = subprocess.run(probe, capture_output=True, text=True, check=False)
    if tried.returncode:
        pytest.skip(f"the kernel refuses network namespaces: {tried.stderr.strip()}")
    _ip("netns", "delete", probed)


def _ip(*arguments: str) -> None:
    subprocess.run(("ip", *arguments), check=True)
