"""Connect to the first of a host's addresses that answers (happy eyeballs, RFC 8305)."""

import asyncio
import socket
from collections import deque
from itertools import chain, zip_longest

STAGGER_SECONDS = 0.25  # before the next address is tried as well (RFC 8305, section 5)

_Name = tuple[str | int | bytes, ...]
_Address = tuple[socket.AddressFamily, _Name]


async def dial(host: str, port: int) -> socket.socket:
    """Return a connected, non-blocking socket.

    asyncio has this as `happy_eyeballs_delay`, but uvloop does not support it.

    For example, mail.example.com has the addresses 2001:db8::1, which drops packets, and 192.0.2.1.
    The attempt with 2001:db8::1 begins at 0 s, and the attempt with 192.0.2.1 at 0.25 s, beside it.
    192.0.2.1 answers at 0.26 s; its socket is returned, and the other attempt is cancelled.

    Raises OSError if the name is not known, or the error of the first attempt that failed if all
    do; UnicodeError if the name has no form for the DNS.
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
            # 2. Wait until an attempt ends, but at most 0.25 s while an address is left.
            ended, attempts = await asyncio.wait(
                attempts,
                timeout=STAGGER_SECONDS if waiting else None,
                return_when=asyncio.FIRST_COMPLETED,
            )
            # 3. Take the first that succeeded. If two succeed at the same moment, close the second.
            for attempt in ended:
                if error := attempt.exception():
                    failures.append(error)
                elif winner is None:
                    winner = attempt.result()
                else:
                    attempt.result().close()
    finally:
        # 4. Cancel the other attempts, and close a socket that connected in spite of it.
        for attempt in attempts:
            attempt.cancel()
        for late in await asyncio.gather(*attempts, return_exceptions=True):
            if isinstance(late, socket.socket):
                late.close()
    if winner is None:
        raise failures[0]
    return winner


async def _addresses(host: str, port: int) -> list[_Address]:
    """Return the host's addresses, IPv6 and IPv4 in turns. The system's first choice comes first.

    For example, the addresses 6a, 6b, 6c and 4a become 6a, 4a, 6b, 6c (RFC 8305, section 4).
    """
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses: list[_Address] = [(family, address) for family, _, _, _, address in found]
    preferred_family = addresses[0][0]
    first = [address for address in addresses if address[0] == preferred_family]
    others = [address for address in addresses if address[0] != preferred_family]
    return [address for address in chain(*zip_longest(first, others)) if address]


async def _connect(family: socket.AddressFamily, address: _Name) -> socket.socket:
    connection = socket.socket(family, socket.SOCK_STREAM)
    try:
        connection.setblocking(False)
        await asyncio.get_running_loop().sock_connect(connection, address)
    except BaseException:
        connection.close()
        raise
    return connection
