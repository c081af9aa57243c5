"""HTTP/1.0 clients get no chunks. The connection closes after an answer unless they ask not to."""

import sys
from collections.abc import Iterator

import pytest

from tests.support.service import PATIENCE, Service
from tests.support.wire import say

SLOW_APP = (sys.executable, "-m", "tests.support.slow_app")
KEEP = b"Connection: keep-alive\r\n"
LIVEZ = b"GET /livez HTTP/1.0\r\n"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with Service(tmp_path_factory.mktemp("old")) as service:
        yield service


@pytest.fixture(scope="module")
def slow_app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """An app with answers without a Content-Length."""
    with Service(tmp_path_factory.mktemp("slow_app"), command=SLOW_APP) as slow_app:
        yield slow_app


@pytest.mark.parametrize("asks", [b"", KEEP], ids=["plain", "keep-alive"])
def test_an_answer_without_a_length_ends_with_the_connection(service: Service, asks: bytes) -> None:
    task = service.post("/send-notification/ada@example.com").json()
    service.wait_for(task["id"])
    request = f"GET /tasks/{task['id']}/events HTTP/1.0\r\n".encode()
    said = say(service.port, request + asks + b"\r\n", patience=PATIENCE)
    head, _, body = said.raw.partition(b"\r\n\r\n")
    assert said.closed
    assert b"transfer-encoding" not in head
    assert b"\r\nconnection: close" in head
    assert b"\nevent: end\n" in body
    assert b'"status":"succeeded"' in body
    assert body.endswith(b"\n\n")


def test_the_connection_also_closes_after_an_answer_with_a_length(service: Service) -> None:
    said = say(service.port, LIVEZ + b"\r\n", patience=PATIENCE)
    (answer,) = said.responses
    assert said.closed
    assert (answer.status, answer.body, answer.headers["connection"]) == (200, b"ok\n", "close")


def test_the_connection_stays_open_for_a_client_that_sends_keep_alive(service: Service) -> None:
    said = say(service.port, (LIVEZ + KEEP + b"\r\n") * 2 + LIVEZ + b"\r\n", patience=PATIENCE)
    assert said.closed
    connection = [answer.headers["connection"] for answer in said.responses]
    assert connection == ["keep-alive", "keep-alive", "close"]


def test_an_answer_that_closes_the_connection_does_not_say_keep_alive(service: Service) -> None:
    """The server refuses this malformed request, and reads no further request."""
    two_hosts = b"Host: a\r\nHost: b\r\n"
    said = say(service.port, LIVEZ + KEEP + two_hosts + b"\r\n", patience=PATIENCE)
    assert said.closed
    assert said.statuses == [400]
    assert b"keep-alive" not in said.raw


def test_an_answer_without_a_body_needs_no_length(slow_app: Service) -> None:
    head = b"HEAD /work?0 HTTP/1.0\r\n"
    said = say(slow_app.port, head + KEEP + b"\r\n" + head + b"\r\n", patience=PATIENCE)
    assert said.closed
    assert said.statuses == [200, 200]


def test_an_expectation_of_100_continue_is_ignored(slow_app: Service) -> None:
    """HTTP/1.0 has no 100 Continue (RFC 9110, section 10.1.1)."""
    request = b"POST /work?0 HTTP/1.0\r\nExpect: 100-continue\r\nContent-Length: 3\r\n\r\nabc"
    said = say(slow_app.port, request, patience=PATIENCE)
    assert said.closed
    assert said.raw.startswith(b"HTTP/1.1 200 ")
    assert said.raw.endswith(b"\r\n\r\n3")


def test_control_an_http_1_1_client_gets_chunks(slow_app: Service) -> None:
    """The same app, with an HTTP/1.1 request."""
    request = b"GET /work?0 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    assert b"\r\ntransfer-encoding: chunked\r\n" in say(slow_app.port, request).raw
