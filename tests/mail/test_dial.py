"""Connecting to a host with several addresses: the first address that answers wins."""

import asyncio
import errno
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack

import pytest

from app.mail import dial as dial_module
from app.mail.dial import dial
from app.mail.replies import ServerUnavailable
from tests.support.mails import RECIPIENT, MakeMailer, failure, send
from tests.support.smtp_server import SmtpServer

pytestmark = pytest.mark.anyio

Resolve = Callable[..., None]


@pytest.fixture
async def listener() -> AsyncIterator[asyncio.Server]:
    """A server on 127.0.0.1 that accepts connections."""

    async def take(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    async with await asyncio.start_server(take, "127.0.0.1", 0) as server:
        yield server


@pytest.fixture
def swallowing() -> Iterator[int]:
    """A port of 127.0.0.2 with a full accept queue: it neither accepts nor refuses connections."""
    with ExitStack() as sockets:
        full = sockets.enter_context(socket.socket())
        full.bind(("127.0.0.2", 0))
        full.listen(0)
        for _ in range(4):  # more than the accept queue holds
            waiting = sockets.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(full.getsockname())
        yield full.getsockname()[1]


@pytest.fixture
def resolve(monkeypatch: pytest.MonkeyPatch) -> Resolve:
    """A function that makes every name resolve to these addresses and ports."""

    def to(*addresses: tuple[str, int]) -> None:
        async def getaddrinfo(*_: object, **__: object) -> list[tuple[object, ...]]:
            return [
                (
                    socket.AF_INET6 if ":" in address else socket.AF_INET,
                    socket.SOCK_STREAM,
                    0,
                    "",
                    (address, port),
                )
                for address, port in addresses
            ]

        monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", getaddrinfo)

    return to


def port_of(server: asyncio.Server) -> int:
    port: int = server.sockets[0].getsockname()[1]
    return port


async def test_the_next_address_is_tried_while_the_first_is_silent(
    listener: asyncio.Server, swallowing: int, resolve: Resolve
) -> None:
    resolve(("127.0.0.2", swallowing), ("127.0.0.1", port_of(listener)))
    with await dial("smtp.example.com", 25) as connected:
        assert connected.getpeername() == ("127.0.0.1", port_of(listener))


async def test_the_next_address_is_tried_at_once_when_the_first_refuses(
    listener: asyncio.Server, resolve: Resolve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dial_module, "STAGGER_SECONDS", 60)
    resolve(("127.0.0.2", port_of(listener)), ("127.0.0.1", port_of(listener)))
    async with asyncio.timeout(30):
        with await dial("smtp.example.com", 25) as connected:
            assert connected.getpeername()[0] == "127.0.0.1"


async def test_a_slow_first_address_may_still_win(
    listener: asyncio.Server, resolve: Resolve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The attempt at the first address continues after the attempt at the second has failed."""
    monkeypatch.setattr(dial_module, "STAGGER_SECONDS", 0.01)
    loop = asyncio.get_running_loop()
    connect = loop.sock_connect

    async def connect_slowly(sock: socket.socket, address: tuple[str, int]) -> None:
        if address[0] == "127.0.0.1":
            await asyncio.sleep(0.1)
        await connect(sock, address)

    monkeypatch.setattr(loop, "sock_connect", connect_slowly)
    resolve(("127.0.0.1", port_of(listener)), ("127.0.0.2", port_of(listener)))
    with await dial("smtp.example.com", 25) as connected:
        assert connected.getpeername()[0] == "127.0.0.1"


async def test_all_connections_but_the_winner_are_closed(
    listener: asyncio.Server, resolve: Resolve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two attempts succeed together, and a third succeeds while it is being cancelled."""
    monkeypatch.setattr(dial_module, "STAGGER_SECONDS", 0)
    opened: list[socket.socket] = []
    started = asyncio.Event()

    async def connect(*_: object) -> socket.socket:
        opened.append(made := socket.socket())
        if len(opened) == 3:
            started.set()
        try:
            await started.wait()
            if len(opened) > 2 and made is opened[2]:
                await asyncio.sleep(60)
        except asyncio.CancelledError:
            pass  # the connection succeeded just before the cancellation
        return made

    monkeypatch.setattr(dial_module, "_connect", connect)
    resolve(*[("127.0.0.1", port_of(listener))] * 3)
    with await dial("smtp.example.com", 25) as winner:
        assert [sock.fileno() == -1 for sock in opened].count(False) == 1
        assert winner.fileno() != -1


async def test_ipv6_and_ipv4_addresses_alternate(resolve: Resolve) -> None:
    """So a network without IPv6 costs one delay, however many IPv6 addresses the host has."""
    resolve(("::1", 1), ("::2", 1), ("::3", 1), ("127.0.0.1", 1), ("127.0.0.2", 1))
    found = [address[0] for _, address in await dial_module._addresses("smtp.example.com", 25)]
    assert found == ["::1", "127.0.0.1", "::2", "127.0.0.2", "::3"]


async def test_if_no_address_answers_the_error_of_the_first_is_raised(
    resolve: Resolve, listener: asyncio.Server
) -> None:
    port = port_of(listener)
    listener.close()
    await listener.wait_closed()
    resolve(("127.0.0.1", port), ("127.0.0.2", port))
    with pytest.raises(ConnectionRefusedError) as refused:
        await dial("smtp.example.com", 25)
    assert refused.value.errno == errno.ECONNREFUSED
    assert "127.0.0.1" in str(refused.value)


async def test_a_mail_goes_to_the_second_address_and_the_server_is_reported_reachable(
    server: SmtpServer, swallowing: int, resolve: Resolve, mailer_to: MakeMailer
) -> None:
    resolve(("127.0.0.2", swallowing), ("127.0.0.1", server.port))
    mailer = mailer_to(server, host="smtp.example.com")
    assert await mailer.check()
    await send(mailer)
    assert server.received[0].recipients == (RECIPIENT,)


@pytest.mark.parametrize(
    "host", ["smtp..example.com", f"{'x' * 64}.example.com", "no-such-host.invalid"]
)
async def test_a_host_that_cannot_be_looked_up_defers_the_mail(
    server: SmtpServer, mailer_to: MakeMailer, host: str
) -> None:
    """For some names not the connection fails, but the encoding of the name."""
    mailer = mailer_to(server, host=host)
    assert isinstance(await failure(send(mailer)), ServerUnavailable)
    assert not await mailer.check()
    assert mailer.open_connections == 0
