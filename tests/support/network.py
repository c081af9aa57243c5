"""Separate machines: Linux network namespaces, each with a cable (veth) to one switch (bridge)."""

import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Self

import pytest

from tests.support.tools import skip_or_fail, tool

NETWORK = "198.18.77"  # from the range reserved for tests between networks (RFC 2544)
SUBNET = f"{NETWORK}.0/24"
HERE = f"{NETWORK}.1"  # this machine's address


class Machine:
    """A machine at the switch. A command that begins with `within` runs on it."""

    def __init__(self, switch: str, number: int) -> None:
        self.address = f"{NETWORK}.{number + 1}"
        self._switch = switch
        self._name = f"{switch}-{number}"
        # Not `ip netns exec`: it also mounts, which fails where / is not a mount point.
        self.within = ("nsenter", f"--net=/run/netns/{self._name}")
        self._plug = f"{switch}p{number}"

    def __enter__(self) -> Self:
        """Create the namespace, and connect it."""
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
        """Delete the namespace and its cable."""
        _ip("netns", "delete", self._name)

    def plug_in(self) -> None:
        """Connect the machine to the switch."""
        _ip("link", "set", self._plug, "master", self._switch)

    def unplug(self) -> None:
        """Disconnect the machine at the switch. Its own interface stays up; packets are lost."""
        _ip("link", "set", self._plug, "nomaster")


@contextmanager
def machines(count: int) -> Iterator[Sequence[Machine]]:
    """Yield `count` machines that reach each other, and this machine at HERE."""
    _skip_unless_possible()
    switch = f"aft{os.getpid()}"
    _ip("link", "add", switch, "type", "bridge")
    try:
        _ip("address", "add", f"{HERE}/24", "dev", switch)
        _ip("link", "set", switch, "up")
        with ExitStack() as stack:
            yield [stack.enter_context(Machine(switch, number + 1)) for number in range(count)]
    finally:
        _ip("link", "delete", switch)


def _skip_unless_possible() -> None:
    """Skip the test if network namespaces are impossible; in CI only if the kernel refuses them."""
    tool("ip")
    if os.geteuid():
        skip_or_fail("network namespaces need root")
    probe = ("ip", "netns", "add", probed := f"aft{os.getpid()}-probe")
    tried = subprocess.run(probe, capture_output=True, text=True, check=False)
    if tried.returncode:
        pytest.skip(f"the kernel refuses network namespaces: {tried.stderr.strip()}")
    _ip("netns", "delete", probed)


def _ip(*arguments: str) -> None:
    subprocess.run(("ip", *arguments), check=True)
