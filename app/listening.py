"""Open the sockets on which the API and the mail catcher listen, and tell how to reach them."""

import contextlib
import errno
import os
import socket
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path
from typing import Any

_LISTEN = "0A"  # the state of a listening socket in /proc/net/tcp (proc(5))
_LAST_PORT = 65_535
_FIRST_USER_PORT = 1024  # the ports below are for root (RFC 6335, 6: system ports)

Address = tuple[Any, ...]
"""The address of a socket: (IP address, port), and for IPv6 also the flow and the scope."""


class CannotListen(OSError):
    """A socket cannot be opened. The message names the setting, and says what to do.

    `processes` are the ids of the processes that listen at the port, as far as they are known.
    """

    def __init__(self, message: str, processes: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.processes = processes


def bind(host: str, port: int, *, prefix: str = "") -> list[socket.socket]:
    """Open and bind a socket for each address of `host`. The caller lets them listen.

    With port 0 the system chooses one port for all addresses. `prefix` is the beginning of the
    settings' names, prefix + HOST and prefix + PORT, in messages.

    Raises CannotListen if another program listens at the port of any address, because clients of
    this address would reach that program. An address that this machine does not have is skipped,
    unless there is no other. For example, /etc/hosts may list an IPv6 address on a machine without
    IPv6.
    """
    opened: list[socket.socket] = []
    missing = []  # addresses that this machine does not have
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
            raise _explained(error, address[0], chosen, prefix) from error
    if not opened:
        raise CannotListen(
            f"{prefix}HOST={host} is not an address of this machine: {', '.join(missing)}"
        )
    return opened


def authority(host: str, port: int) -> str:
    """Return HOST:PORT as in URLs, with an IPv6 address in brackets (RFC 3986, 3.2.2)."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def url(host: str, port: int, root_path: str | None = None) -> str:
    """Return the URL of the API for a client on this machine, without a final slash."""
    return f"http://{authority(_reachable(host), port)}{root_path or ''}"


def _reachable(host: str) -> str:
    """Return a name for 0.0.0.0 and ::, which stand for every address of the machine.

    `localhost` may be an IPv4 address only, and a socket at :: takes no IPv4 (see `bind`).
    """
    try:
        address = ip_address(host)
    except ValueError:
        return host
    if not address.is_unspecified:
        return host
    return "localhost" if address.version == 4 else "::1"  # noqa: PLR2004 -- IPv4


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server at this host."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _addresses(host: str, port: int, prefix: str) -> list[tuple[int, Address]]:
    """Return each address of a host once, with its family. /etc/hosts may list one twice."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:  # UnicodeError: an invalid name, such as "a..b"
        reason = getattr(error, "strerror", None) or "it is not a host name"
        raise CannotListen(f"{prefix}HOST={host} cannot be looked up: {reason}") from error
    return list(dict.fromkeys((family, address) for family, _, _, _, address in found))


def _open(family: int, address: Address) -> socket.socket:
    opened = socket.socket(family, socket.SOCK_STREAM)
    try:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:  # otherwise "::" would also take the port on 0.0.0.0
            opened.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        opened.bind(address)
    except BaseException:
        opened.close()
        raise
    return opened


def _explained(error: OSError, ip: str, port: int, prefix: str) -> CannotListen:
    """Return the error with the reason why this port is refused, and a command that works."""
    if error.errno == errno.EADDRINUSE:
        processes = tuple(_processes_at(port))
        holder = _describe(processes[0]) if processes else "another program"
        return CannotListen(
            f"{authority(ip, port)} is taken by {holder}. Stop it, or choose another port: "
            f"{prefix}PORT={port - 1 if port == _LAST_PORT else port + 1} make run",
            processes,
        )
    if error.errno == errno.EACCES and port < _FIRST_USER_PORT:
        return CannotListen(
            f"only root may listen at port {port}. Choose a port from {_FIRST_USER_PORT} on: "
            f"{prefix}PORT={port + 8000} make run"
        )
    where = authority(ip, port)
    return CannotListen(f"{prefix}HOST, {prefix}PORT: cannot listen at {where}: {error.strerror}")


# The process that listens at a port, where the system has /proc


def _processes_at(port: int) -> Iterator[int]:
    """Yield the processes that listen at this port of any address, as far as /proc shows them."""
    links = {f"socket:[{inode}]" for inode in _listening_inodes(port)}
    with contextlib.suppress(OSError):  # no /proc, as on macOS
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # the process has ended, or belongs to another user
                descriptors = (process / "fd").iterdir()
                if any(os.readlink(descriptor) in links for descriptor in descriptors):  # noqa: PTH115
                    yield int(process.name)


def _listening_inodes(port: int) -> Iterator[str]:
    """Yield the inodes of the sockets that listen at this port."""
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(OSError):
            for line in Path(table).read_text().splitlines()[1:]:
                columns = line.split()
                if columns[3] == _LISTEN and int(columns[1].rpartition(":")[2], 16) == port:
                    yield columns[9]


def _describe(process: int) -> str:
    """Return the id and the name of a process, without its arguments: they may contain secrets."""
    try:
        return f"process {process} ({Path(f'/proc/{process}/comm').read_text().strip()})"
    except OSError:
        return f"process {process}"
