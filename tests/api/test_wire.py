"""Requests that no well-meaning client sends, byte by byte, to a real server."""

import socket

import pytest

from tests.support.service import Service

HEAD = b"POST /process/ HTTP/1.1\r\n"


def status_of(service: Service, request: bytes) -> int:
    """What the server answers to these bytes; 0 if it just closes the connection."""
    with socket.create_connection(("127.0.0.1", service.port), timeout=5) as connection:
        try:
            connection.sendall(request)
            answer = connection.recv(4096)
        except ConnectionError:
            return 0
    return int(answer.split()[1]) if answer else 0


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"nonsense\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        HEAD + b"Host: x\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{} ",
        HEAD + b"Host: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        HEAD + b"Host: x\r\nContent-Length: two\r\n\r\n{}",
        HEAD + b"Host: x\r\nContent-Length: -2\r\n\r\n{}",
        HEAD + b"Host: x\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n",
        HEAD + b"Host: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n",
        HEAD + b"Host: x\r\nHeader without a colon\r\n\r\n",
    ],
    ids=[
        "nonsense",
        "TLS",
        "two lengths",
        "a length and chunks",
        "a length in words",
        "a negative length",
        "a length of 5,000 digits",
        "a chunk of no length",
        "no colon",
    ],
)
def test_a_request_that_is_not_http_is_refused(service: Service, request_bytes: bytes) -> None:
    assert status_of(service, request_bytes) in {0, 400}
    assert service.get("/livez").is_success
