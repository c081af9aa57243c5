"""Sockets to listen on: one for each address of the host, or an error that says what to do."""

import errno
import os
import socket
from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest

from app import listening
from app.listening import CannotListen, authority, bind, is_loopback, url
from tests.support.service import free_port

MISSING = (socket.AF_INET6, ("2001:db8::1", 0, 0, 0))  # RFC 3849: no machine has such an address
FIRST = (socket.AF_INET, ("127.0.0.1", 0))
SECOND = (socket.AF_INET, ("127.0.0.2", 0))

Found = tuple[int, tuple[object, ...]]


@pytest.fixture
def hosts(monkeypatch: pytest.MonkeyPatch) -> list[Found]:
    """The addresses that every host name has, instead of those of /etc/hosts and DNS."""
    found: list[Found] = []

    def look_up(*_: object, **__: object) -> list[tuple[object, ...]]:
        return [(family, socket.SOCK_STREAM, 6, "", address) for family, address in found]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    return found


@pytest.fixture
def taken() -> Iterator[int]:
    """A port of 127.0.0.2 on which this process listens."""
    port = free_port()
    with socket.create_server(("127.0.0.2", port)):
        yield port


def names(sockets: list[socket.socket]) -> list[tuple[str, int]]:
    """Return the IP address and the port of each socket, and close it."""
    found = [opened.getsockname()[:2] for opened in sockets]
    for opened in sockets:
        opened.close()
    return found


def test_each_address_of_a_host_gets_a_socket_with_the_same_port(hosts: list[Found]) -> None:
    hosts += [FIRST, SECOND, FIRST]  # /etc/hosts may name an address twice
    (first, port), second = names(bind("localhost", 0))
    assert (first, second) == ("127.0.0.1", ("127.0.0.2", port))
    assert port


def test_an_address_that_the_machine_lacks_is_skipped(hosts: list[Found]) -> None:
    hosts += [MISSING, FIRST]
    port = free_port()
    assert names(bind("localhost", port)) == [("127.0.0.1", port)]


def test_a_host_without_a_usable_address_is_refused_with_its_addresses(hosts: list[Found]) -> None:
    hosts += [MISSING]
    with pytest.raises(CannotListen, match=r"^HOST=elsewhere is not an address .*: 2001:db8::1 \("):
        bind("elsewhere", 0)


def test_a_port_that_is_taken_on_one_address_of_a_host_is_refused(
    hosts: list[Found], taken: int
) -> None:
    """Otherwise clients that connect to that address would reach a different program."""
    hosts += [FIRST, SECOND]
    with pytest.raises(CannotListen) as refusal:
        bind("localhost", taken)
    assert f"127.0.0.2:{taken} is taken by process {os.getpid()} (" in str(refusal.value)
    assert f" PORT={taken + 1} make run" in str(refusal.value)
    assert refusal.value.processes == (os.getpid(),)
    with socket.socket() as other:  # the socket at the first address is closed
        other.bind(("127.0.0.1", taken))


def test_a_taken_port_is_refused_even_if_its_process_is_unknown(
    monkeypatch: pytest.MonkeyPatch, taken: int
) -> None:
    monkeypatch.setattr(listening, "_listening_inodes", lambda _: iter(()))
    with pytest.raises(CannotListen, match="taken by another program") as refusal:
        bind("127.0.0.2", taken)
    assert refusal.value.processes == ()


@pytest.mark.parametrize(
    ("number", "port", "says"),
    [
        (errno.EADDRINUSE, 65_535, r"SMTP_PORT=65534 make run"),
        (errno.EACCES, 25, r"only root may listen at port 25\. .* SMTP_PORT=8025 make run"),
        (errno.EACCES, 2525, r"^SMTP_HOST, SMTP_PORT: cannot listen at 127\.0\.0\.1:2525: Perm"),
        (errno.EINVAL, 25, r"^SMTP_HOST, SMTP_PORT: cannot listen at 127\.0\.0\.1:25: Invalid"),
    ],
)
def test_a_refusal_names_the_setting_and_a_remedy(
    monkeypatch: pytest.MonkeyPatch, number: int, port: int, says: str
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(listening, "_open", refuse)
    with pytest.raises(CannotListen, match=says):
        bind("127.0.0.1", port, prefix="SMTP_")


@pytest.mark.parametrize("host", ["nowhere.invalid", "a..b"])
def test_a_host_that_cannot_be_looked_up_is_named(host: str) -> None:
    with pytest.raises(CannotListen, match=f"^HOST={host} cannot be looked up: "):
        bind(host, 0)


@pytest.mark.parametrize(
    ("host", "written"),
    [("localhost", "localhost:80"), ("127.0.0.1", "127.0.0.1:80"), ("::1", "[::1]:80")],
)
def test_a_host_and_its_port_are_written_as_in_a_url(host: str, written: str) -> None:
    assert authority(host, 80) == written


@pytest.mark.parametrize(
    ("host", "root_path", "address"),
    [
        ("127.0.0.1", None, "http://127.0.0.1:8000"),
        ("localhost", "/afterward", "http://localhost:8000/afterward"),
        ("0.0.0.0", None, "http://localhost:8000"),
        ("::", None, "http://[::1]:8000"),
        ("0:0::0", None, "http://[::1]:8000"),
        ("::1", None, "http://[::1]:8000"),
    ],
)
def test_a_url_names_an_address_of_this_machine(
    host: str, root_path: str | None, address: str
) -> None:
    assert url(host, 8000, root_path) == address


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "localhost", "::", "::1"])
def test_a_client_on_this_machine_can_connect_to_the_host_and_port_of_the_url(host: str) -> None:
    listeners = bind(host, 0)
    for listener in listeners:
        listener.listen()
    at = urlsplit(url(host, listeners[0].getsockname()[1]))
    assert at.hostname is not None
    socket.create_connection((at.hostname, at.port), timeout=5).close()
    for listener in listeners:
        listener.close()


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        *[(host, True) for host in ("localhost", "127.0.0.1", "127.1.2.3", "::1")],
        *[(host, False) for host in ("0.0.0.0", "::", "192.0.2.1", "mail.example.com", "")],
    ],
)
def test_only_this_machine_reaches_a_loopback_host(host: str, *, expected: bool) -> None:
    assert is_loopback(host) == expected
