"""Connect to the first of a host's addresses that answers (happy eyeballs, RFC 8305)."""

import asyncio
import socket
from collections import deque
from itertools import chain, zip_longest

STAGGER_SECONDS = 0.25  # before the next address is tried as well (RFC 8305, section 5)

_Name = tuple[str | int | bytes, ...]
_Address = tuple[socket.AddressFamily, _Name]


async def dial(host: str, port: int) -> socket.socket:
    """Return a connected socket, which does not block.

    An address that has not answered after 0.25 s, or has refused, is no reason to wait: the next
    one is tried beside it. uvloop has no happy eyeballs of its own, so asyncio's cannot be used.

    Raises OSError if the name is not known, or the error of the first address if none answers;
    UnicodeError for a name that the DNS has no form for.
    """
    waiting = deque(await _addresses(host, port))
    attempts: set[asyncio.Task[socket.socket]] = set()
    failures: list[BaseException] = []
    winner: socket.socket | None = None
    try:
        while winner is None and (waiting or attempts):
            # 1. Begin the next attempt, if an address is left.
            if waiting:
                attempts.add(asyncio.create_task(_connect(*waiting.popleft())))
            # 2. Give all attempts under way the time of one; the last ones have no such bound.
            ended, attempts = await asyncio.wait(
                attempts,
                timeout=STAGGER_SECONDS if waiting else None,
                return_when=asyncio.FIRST_COMPLETED,
            )
            # 3. Take the first that succeeded. With two at the same moment, close the second.
            for attempt in ended:
                if error := attempt.exception():
                    failures.append(error)
                elif winner is None:
                    winner = attempt.result()
                else:
                    attempt.result().close()
    finally:
        for attempt in attempts:
            attempt.cancel()
        for late in await asyncio.gather(*attempts, return_exceptions=True):
            if isinstance(late, socket.socket):
                late.close()
    if winner is None:
        raise failures[0]
    return winner


async def _addresses(host: str, port: int) -> list[_Address]:
    """Look the host up; IPv6 and IPv4 alternate, in the order that the system prefers."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses: list[_Address] = [(family, address) for family, _, _, _, address in found]
    first = [one for one in addresses if one[0] == addresses[0][0]]
    others = [one for one in addresses if one[0] != addresses[0][0]]
    return [one for one in chain(*zip_longest(first, others)) if one]


async def _connect(family: socket.AddressFamily, address: _Name) -> socket.socket:
    connection = socket.socket(family, socket.SOCK_STREAM)
    try:
        connection.setblocking(False)
        await asyncio.get_running_loop().sock_connect(connection, address)
    except BaseException:
        connection.close()
        raise
    return connection
