"""Opens the sockets on which the API and the mail catcher listen, or says why it cannot."""

import contextlib
import errno
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_LISTEN = "0A"  # a socket's state in /proc/net/tcp (proc(5))
_LAST_PORT = 65_535
_FIRST_OPEN_PORT = 1024  # those below are for root (RFC 6335, 6: system ports)

Address = tuple[Any, ...]
"""A socket address: (IP address, port), and for IPv6 also the flow and the scope."""


class CannotListen(OSError):
    """No socket can be opened. The message names the setting and says what to do about it.

    `processes` are the ids of the processes that hold the port, as far as the system tells.
    """

    def __init__(self, message: str, processes: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.processes = processes


def bind(host: str, port: int, *, prefix: str = "") -> list[socket.socket]:
    """Open a socket for each address of `host` that this machine has; nothing listens on it yet.

    /etc/hosts may name an IPv6 address on a machine without IPv6: such an address is passed over
    while another one can be had. A port that is taken is an error on any of them, because clients
    of that address would reach another program. With port 0 the system chooses one port for all.
    The settings are named `prefix` + HOST and `prefix` + PORT in the message of CannotListen.
    """
    opened: list[socket.socket] = []
    missing = []
    for family, address in _addresses(host, port, prefix):
        chosen = port or (opened[0].getsockname()[1] if opened else 0)
        try:
            opened.append(_open(family, (address[0], chosen, *address[2:])))
        except OSError as error:
            if error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                missing.append(f"{address[0]} ({error.strerror})")
                continue
            for other in opened:
                other.close()
            raise _refusal(error, address[0], chosen, prefix) from error
    if not opened:
        raise CannotListen(
            f"{prefix}HOST={host} is no address of this machine: {', '.join(missing)}"
        )
    return opened


def authority(host: str, port: int) -> str:
    """Write a host and a port as URLs have them: an IPv6 address in brackets (RFC 3986, 3.2.2)."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _addresses(host: str, port: int, prefix: str) -> list[tuple[int, Address]]:
    """Look up the addresses of a host, each with its family; /etc/hosts may name one twice."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:  # UnicodeError: no host name at all, such as "a..b"
        reason = getattr(error, "strerror", None) or "it is no host name"
        raise CannotListen(f"{prefix}HOST={host} cannot be looked up: {reason}") from error
    return list(dict.fromkeys((family, address) for family, _, _, _, address in found))


def _open(family: int, address: Address) -> socket.socket:
    opened = socket.socket(family, socket.SOCK_STREAM)
    try:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:  # else "::" would also take the port of 0.0.0.0
            opened.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        opened.bind(address)
    except BaseException:
        opened.close()
        raise
    return opened


def _refusal(error: OSError, ip: str, port: int, prefix: str) -> CannotListen:
    """Say why the system refuses this port, and with which command the service would start."""
    if error.errno == errno.EADDRINUSE:
        processes = tuple(_listeners(port))
        holder = _name(processes[0]) if processes else "another program"
        return CannotListen(
            f"{authority(ip, port)} is taken by {holder}. Stop it, or choose another port: "
            f"{prefix}PORT={port - 1 if port == _LAST_PORT else port + 1} make run",
            processes,
        )
    if error.errno == errno.EACCES and port < _FIRST_OPEN_PORT:
        return CannotListen(
            f"only root may listen at port {port}. Choose one from {_FIRST_OPEN_PORT} up: "
            f"{prefix}PORT={port + 8000} make run"
        )
    where = authority(ip, port)
    return CannotListen(f"{prefix}HOST, {prefix}PORT: cannot listen at {where}: {error.strerror}")


# Which process it is, where the system has /proc


def _listeners(port: int) -> Iterator[int]:
    """Find the processes that listen at this port of any address, as far as /proc shows them."""
    links = {f"socket:[{inode}]" for inode in _listening_inodes(port)}
    with contextlib.suppress(OSError):  # no /proc, as on macOS
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it has ended, or is another user's
                descriptors = (process / "fd").iterdir()
                if any(os.readlink(descriptor) in links for descriptor in descriptors):  # noqa: PTH115
                    yield int(process.name)


def _listening_inodes(port: int) -> Iterator[str]:
    """Find the sockets that listen at this port, by their inodes."""
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(OSError):
            for line in Path(table).read_text().splitlines()[1:]:
                columns = line.split()
                if columns[3] == _LISTEN and int(columns[1].rpartition(":")[2], 16) == port:
                    yield columns[9]


def _name(process: int) -> str:
    """Name a process for people. Not by its arguments: they may hold its secrets."""
    try:
        return f"process {process} ({Path(f'/proc/{process}/comm').read_text().strip()})"
    except OSError:
        return f"process {process}"
