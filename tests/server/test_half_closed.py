"""Clients that close their sending side, as `nc -N` does, and wait for the answers."""

import contextlib
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.service import PATIENCE, Service, until
from tests.support.wire import Said

SLOW_APP = (sys.executable, "-m", "tests.support.slow_app")
HOST = b"Host: localhost\r\n"
GET = b"GET /livez HTTP/1.1\r\n" + HOST + b"\r\n"
POST = b"POST /send-notification/ada@example.com HTTP/1.1\r\n" + HOST
WORK = b"POST /work?0.5 HTTP/1.1\r\n" + HOST


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service with a long client timeout, so that no connection of a test ends because of it."""
    directory = tmp_path_factory.mktemp("half-closed")
    with Service(directory, client_timeout_seconds=2 * PATIENCE) as service:
        yield service


@pytest.fixture(scope="module")
def slow_app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """An app that answers after the number of seconds in the request."""
    directory = tmp_path_factory.mktemp("slow_app")
    with Service(
        directory, command=SLOW_APP, client_timeout_seconds=2 * PATIENCE, keep_alive_seconds=75
    ) as slow_app:
        yield slow_app


def say_all(port: int, request: bytes) -> Said:
    """Send raw bytes, close the sending side, and read until the server closes."""
    heard = b""
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as connection:
        connection.sendall(request)
        connection.shutdown(socket.SHUT_WR)
        while block := connection.recv(1 << 16):
            heard += block
    return Said(heard, closed=True)


def test_the_request_is_answered_and_then_the_connection_closes(service: Service) -> None:
    said = say_all(service.port, POST + b"Content-Length: 0\r\n\r\n")
    assert said.statuses == [202]


def test_each_of_several_pipelined_requests_is_answered(service: Service) -> None:
    assert say_all(service.port, GET + POST + b"Content-Length: 0\r\n\r\n" + GET).statuses == [
        200,
        202,
        200,
    ]


def test_a_slow_answer_has_connection_close(slow_app: Service) -> None:
    said = say_all(slow_app.port, WORK + b"Content-Length: 3\r\n\r\nabc")
    assert said.raw.startswith(b"HTTP/1.1 200 ")
    assert b"connection: close\r\n" in said.raw
    assert said.raw.endswith(b"1\r\n3\r\n0\r\n\r\n")


@pytest.mark.parametrize(
    "incomplete",
    [b"GET /livez HT", GET[:-2], POST + b"Content-Length: 100\r\n\r\nabc"],
    ids=["half a line", "half a head", "half a body"],
)
def test_an_incomplete_request_is_dropped_at_once(service: Service, incomplete: bytes) -> None:
    assert say_all(service.port, incomplete).raw == b""


@pytest.mark.parametrize(
    "incomplete",
    [b"GET /livez HT", WORK[:-2], WORK + b"Content-Length: 100\r\n\r\nabc"],
    ids=["half a line", "half a head", "half a body"],
)
def test_an_incomplete_request_does_not_affect_the_answers_before_it(
    slow_app: Service, incomplete: bytes
) -> None:
    said = say_all(slow_app.port, WORK + b"Content-Length: 0\r\n\r\n" + incomplete)
    assert said.raw.count(b"HTTP/1.1 ") == 1
    assert said.raw.endswith(b"1\r\n0\r\n0\r\n\r\n")


def test_an_incomplete_request_behind_a_stream_is_dropped_at_once(tmp_path: Path) -> None:
    """The server keeps reading while it sends a stream, so it notices the end of the requests."""
    incomplete = POST + b"Content-Length: 100\r\n\r\nabc"
    with Service(tmp_path, worker_concurrency=0) as service:
        task = service.post("/send-notification/ada@example.com").json()
        stream = f"GET /tasks/{task['id']}/events HTTP/1.1\r\n".encode() + HOST + b"\r\n"
        with socket.create_connection(("127.0.0.1", service.port), timeout=PATIENCE) as connection:
            connection.sendall(stream + incomplete)
            connection.shutdown(socket.SHUT_WR)
            heard = b""
            while b"data: " not in heard:
                heard += connection.recv(1 << 16)
            service.post(f"/tasks/{task['id']}/cancel")  # ends the stream
            while block := connection.recv(1 << 16):
                heard += block
    assert heard.count(b"HTTP/1.1 ") == 1
    assert b'"status":"cancelled"' in heard
    assert heard.endswith(b"\r\n0\r\n\r\n")


def test_a_client_that_sends_nothing_is_disconnected(service: Service) -> None:
    assert say_all(service.port, b"").raw == b""


def test_a_reader_of_events_that_has_gone_is_disconnected_at_the_next_event(tmp_path: Path) -> None:
    """Before that, it looks like a client that has only closed its sending side."""
    with Service(tmp_path, worker_concurrency=0, client_timeout_seconds=0.4) as service:
        before = sockets(service.pid)
        with socket.create_connection(("127.0.0.1", service.port), timeout=PATIENCE) as reader:
            reader.sendall(b"GET /events HTTP/1.1\r\n" + HOST + b"\r\n")
            while b"\r\n\r\n" not in reader.recv(1 << 16):
                pass
        # This event causes a single write. The next write would be a ping after 15 seconds.
        service.post("/send-notification/ada@example.com")
        until(lambda: sockets(service.pid) <= before, within=10, what=service.log)


def sockets(process: int) -> int:
    """Return the number of a process's open sockets."""
    count = 0
    for descriptor in Path(f"/proc/{process}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the process has just closed it
            count += str(descriptor.readlink()).startswith("socket:")
    return count
