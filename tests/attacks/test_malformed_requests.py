"""Requests that are no valid HTTP, or that a proxy in front would read differently.

Each is answered 400 or 431 with a problem, or its connection is closed. A request hidden inside
is never run. Memory stays bounded for requests of any size.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.api.requests import LARGEST_PROBLEM
from tests.support.service import Service
from tests.support.torture import Tried, form
from tests.support.wire import Response, say

TUTORIAL = (sys.executable, "-m", "tests.support.tutorial")

POST = b"POST /test-task/ HTTP/1.1\r\n"
GET = b"GET /livez HTTP/1.1\r\n"
HOST = b"Host: localhost\r\n"
CLOSE = b"Connection: close\r\n"
# A service that reads this as a separate request queues a mail.
HIDDEN = b"POST /send-email/?email=hidden@example.com HTTP/1.1\r\n" + HOST + b"\r\n"
LENGTH = b"Content-Length: %d\r\n" % len(HIDDEN)
CHUNKED = b"Transfer-Encoding: chunked\r\n"
NO_CHUNKS = b"0\r\n\r\n"

MALFORMED = {
    # The end of the body is ambiguous.
    "a length, then chunks": POST + HOST + LENGTH + CHUNKED + b"\r\n" + NO_CHUNKS + HIDDEN,
    "chunks, then a length": POST + HOST + CHUNKED + LENGTH + b"\r\n" + NO_CHUNKS + HIDDEN,
    "a length, and chunks misspelt": (
        POST + HOST + b"Transfer-Encoding: xchunked\r\n" + LENGTH + b"\r\n" + HIDDEN
    ),
    "a length, and chunks after a tab": (
        POST + HOST + LENGTH + b"Transfer-Encoding:\tchunked\r\n\r\n" + NO_CHUNKS + HIDDEN
    ),
    "a length, and chunks on a folded line": (
        POST + HOST + LENGTH + b"Transfer-Encoding:\r\n chunked\r\n\r\n" + NO_CHUNKS + HIDDEN
    ),
    "a length, and chunks with a space before the colon": (
        POST + HOST + LENGTH + b"Transfer-Encoding : chunked\r\n\r\n" + NO_CHUNKS + HIDDEN
    ),
    "two lengths": POST + HOST + b"Content-Length: 0\r\n" + LENGTH + b"\r\n" + HIDDEN,
    "the same length twice": POST + HOST + LENGTH + LENGTH + b"\r\n" + HIDDEN,
    "a list of lengths": POST + HOST + b"Content-Length: 0, 0\r\n\r\n" + HIDDEN,
    "a length in words": POST + HOST + b"Content-Length: two\r\n\r\n" + HIDDEN,
    "a negative length": POST + HOST + b"Content-Length: -2\r\n\r\n" + HIDDEN,
    "a length with a plus": POST + HOST + b"Content-Length: +0\r\n\r\n" + HIDDEN,
    "a length in hexadecimal": POST + HOST + b"Content-Length: 0x2\r\n\r\n" + HIDDEN,
    "a length with an underscore": POST + HOST + b"Content-Length: 1_0\r\n\r\n" + HIDDEN,
    "a length of nothing": POST + HOST + b"Content-Length:\r\n\r\n" + HIDDEN,
    "a length of 5,000 digits": POST + HOST + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n",
    "gzip": POST + HOST + b"Transfer-Encoding: gzip\r\n\r\n" + NO_CHUNKS + HIDDEN,
    "gzip in chunks": POST + HOST + b"Transfer-Encoding: gzip, chunked\r\n\r\n" + NO_CHUNKS,
    "chunks in gzip": POST + HOST + b"Transfer-Encoding: chunked, gzip\r\n\r\n" + HIDDEN,
    "chunks in chunks": POST + HOST + CHUNKED + CHUNKED + b"\r\n" + NO_CHUNKS + HIDDEN,
    "an identity": POST + HOST + b"Transfer-Encoding: identity\r\n" + LENGTH + b"\r\n" + HIDDEN,
    "chunks in HTTP/1.0": (
        b"POST /test-task/ HTTP/1.0\r\n" + HOST + CHUNKED + b"\r\n" + NO_CHUNKS + HIDDEN
    ),
    "a chunk of no length": POST + HOST + CHUNKED + b"\r\nzz\r\n{}\r\n" + NO_CHUNKS,
    "a chunk of a negative length": POST + HOST + CHUNKED + b"\r\n-1\r\n" + NO_CHUNKS,
    "a chunk of an endless length": POST + HOST + CHUNKED + b"\r\n" + b"f" * 18 + b"\r\n",
    "a chunk longer than it says": POST + HOST + CHUNKED + b"\r\n1\r\n" + HIDDEN + NO_CHUNKS,
    "a length as a trailer": POST + HOST + CHUNKED + b"\r\n0\r\n" + LENGTH + b"\r\n" + HIDDEN,
    "chunks with bare line feeds": POST + HOST + CHUNKED + b"\r\n0\n\n" + HIDDEN,
    # The host is ambiguous.
    "no Host": GET + CLOSE + b"\r\n" + HIDDEN,
    "two Hosts": GET + HOST + b"Host: example.com\r\n\r\n" + HIDDEN,
    "the same Host twice": GET + HOST + HOST + b"\r\n" + HIDDEN,
    "an empty Host": GET + b"Host:\r\n\r\n" + HIDDEN,
    "a Host with a user": GET + b"Host: ada@localhost\r\n\r\n" + HIDDEN,
    "a Host with a path": GET + b"Host: localhost/x\r\n\r\n" + HIDDEN,
    "a Host with a space": GET + b"Host: local host\r\n\r\n" + HIDDEN,
    "a Host with a list": GET + b"Host: localhost, example.com\r\n\r\n" + HIDDEN,
    "a Host with two ports": GET + b"Host: localhost:80:81\r\n\r\n" + HIDDEN,
    "a Host that is no ASCII": GET + "Host: é\r\n\r\n".encode() + HIDDEN,
    # The ends of the lines are ambiguous.
    "bare line feeds": b"GET /livez HTTP/1.1\nHost: localhost\n\n" + HIDDEN,
    "one bare line feed": GET + b"Host: localhost\nX: y\r\n\r\n" + HIDDEN,
    "a bare carriage return": GET + HOST + b"X: a\rY: b\r\n\r\n" + HIDDEN,
    "a folded line": GET + HOST + b"X: a\r\n b\r\n\r\n" + HIDDEN,
    "a first header that is folded": GET + b" X: a\r\n" + HOST + b"\r\n" + HIDDEN,
    "a space before a colon": GET + b"Host : localhost\r\n\r\n" + HIDDEN,
    "no colon": GET + HOST + b"Header without a colon\r\n\r\n" + HIDDEN,
    "no name": GET + HOST + b": x\r\n\r\n" + HIDDEN,
    "NUL in a value": GET + HOST + b"X: a\0b\r\n\r\n" + HIDDEN,
    "NUL in a name": GET + HOST + b"X\0: a\r\n\r\n" + HIDDEN,
    "NUL in the path": b"GET /livez\0 HTTP/1.1\r\n" + HOST + b"\r\n" + HIDDEN,
    # It is hardly a request.
    "nonsense": b"nonsense\r\n\r\n" + HIDDEN,
    "a TLS hello": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 500,
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0",
    "HTTP/3.7": b"GET /livez HTTP/3.7\r\n" + HOST + b"\r\n" + HIDDEN,
    "HTTP/0.9": b"GET /livez\r\n\r\n" + HIDDEN,
    "no version": b"GET /livez \r\n" + HOST + b"\r\n" + HIDDEN,
    "an unknown method": b"QUUX /livez HTTP/1.1\r\n" + HOST + b"\r\n" + HIDDEN,
    "a method in lower case": b"get /livez HTTP/1.1\r\n" + HOST + b"\r\n" + HIDDEN,
    "a space in the path": b"GET /live z HTTP/1.1\r\n" + HOST + b"\r\n" + HIDDEN,
    "a path that is no ASCII": b"GET /livez\xff HTTP/1.1\r\n" + HOST + b"\r\n" + HIDDEN,
    "a path without a slash": b"GET livez HTTP/1.1\r\n" + HOST + b"\r\n" + HIDDEN,
    "a host alone": b"GET http://localhost HTTP/1.1\r\n" + HOST + b"\r\n" + HIDDEN,
    "a tunnel": b"CONNECT localhost:25 HTTP/1.1\r\n" + HOST + b"\r\n" + HIDDEN,
}

# Valid, but the service ignores a part of it. It does not read the bytes after an upgrade.
HARMLESS = {
    "the whole address": (
        b"GET http://example.com/livez HTTP/1.1\r\n" + HOST + CLOSE + b"\r\n" + HIDDEN,
        200,
    ),
    "an upgrade to HTTP/2": (
        GET + HOST + b"Connection: Upgrade, close\r\nUpgrade: h2c\r\n\r\n" + HIDDEN,
        200,
    ),
    "an upgrade to a WebSocket": (
        GET + HOST + b"Connection: Upgrade, close\r\nUpgrade: websocket\r\n"
        b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
        + HIDDEN,
        200,
    ),
    "an upgrade with a body": (
        POST + HOST + CLOSE + b"Upgrade: h2c\r\n" + LENGTH + b"\r\n" + HIDDEN,
        202,
    ),
    "a trace": (b"TRACE /livez HTTP/1.1\r\n" + HOST + CLOSE + b"X: secret\r\n\r\n", 405),
    "all of the server": (b"OPTIONS * HTTP/1.1\r\n" + HOST + CLOSE + b"\r\n", 404),
    "a body that hides a request": (POST + HOST + CLOSE + LENGTH + b"\r\n" + HIDDEN, 202),
    "a chunk that hides a request": (
        POST + HOST + CLOSE + CHUNKED + b"\r\n%x\r\n%b\r\n" % (len(HIDDEN), HIDDEN) + NO_CHUNKS,
        202,
    ),
    "a last request, and one more": (GET + HOST + CLOSE + b"\r\n" + HIDDEN, 200),
}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service without a worker, so that a task of a hidden request would stay and be seen."""
    directory = tmp_path_factory.mktemp("malformed")
    with Service(directory, worker_concurrency=0, client_timeout_seconds=0.5) as service:
        yield service


@pytest.fixture(autouse=True)
def no_hidden_request_was_run(service: Service) -> Iterator[None]:
    """Check after each test that no task is queued, and that the service still answers."""
    yield
    assert service.get("/tasks").json()["data"] == []
    assert "Traceback" not in service.log


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_request_is_refused(service: Service, name: str) -> None:
    said = say(service.port, MALFORMED[name])
    assert said.closed
    assert len(said.responses) <= 1
    assert all(map(refuses, said.responses))


@pytest.mark.parametrize("name", HARMLESS)
def test_a_valid_request_is_a_single_request(service: Service, name: str) -> None:
    request, status = HARMLESS[name]
    said = say(service.port, request)
    assert (said.statuses, said.closed) == ([status], True)
    assert b"secret" not in said.raw


def test_report_the_number_of_malformed_requests(tried: Tried) -> None:
    tried(f"{len(MALFORMED)} malformed requests", "each 400, 431 or closed; 0 hidden requests run")
    tried(f"{len(HARMLESS)} valid requests", "a response each; 0 hidden requests run")


@pytest.mark.parametrize("name", ["two Hosts", "nonsense", "chunks, then a length"])
def test_a_malformed_pipelined_request_is_not_answered_before_the_request_ahead_of_it(
    service: Service, name: str
) -> None:
    """Otherwise the client of the first request would get the response to the second."""
    first = b"GET /readyz HTTP/1.1\r\n" + HOST + b"\r\n"
    said = say(service.port, first + MALFORMED[name])
    assert said.closed
    assert said.statuses in ([], [200], [200, 400])


def refuses(response: Response) -> bool:
    """Return whether a response is a small problem with 400 or 431 that closes the connection."""
    return (
        response.status in {400, 431}
        and response.headers["content-type"] == "application/problem+json"
        and response.headers["connection"] == "close"
        and 0 < len(response.body) <= LARGEST_PROBLEM
    )


MEGABYTES = form(20, 50)
MB = 1_000_000


def endless(kind: str) -> bytes:
    """Make a request of many megabytes, all of them outside of its body."""
    size = int(MEGABYTES * MB)
    line = b"X-Header: " + b"x" * 988 + b"\r\n"
    lines = line * (size // len(line))
    return {
        "headers": GET + HOST + lines + b"\r\n",
        "one header": GET + HOST + b"X: " + b"x" * size + b"\r\n\r\n",
        "an address": b"GET /livez?" + b"x" * size + b" HTTP/1.1\r\n" + HOST + b"\r\n",
        "a method": b"G" * size,
        "trailers": POST + HOST + CHUNKED + b"\r\n0\r\n" + lines + b"\r\n",
        "a chunk's extension": POST + HOST + CHUNKED + b"\r\n1;" + b"x" * size + b"\r\n",
        "empty lines": b"\r\n" * (size // 2) + GET + HOST + b"\r\n",
    }[kind]


ENDLESS = [
    "headers",
    "one header",
    "an address",
    "a method",
    "trailers",
    "a chunk's extension",
    "empty lines",
]


def test_endless_requests_are_cut_off_and_need_little_memory(
    service: Service, tried: Tried
) -> None:
    began = Peak(service.pid)
    for kind in ENDLESS:
        said = say(service.port, endless(kind))
        assert said.closed, kind
        # A request with endless trailers may have been answered before the trailers.
        assert all(refuses(response) or response.status == 202 for response in said.responses), kind
    grown = began.grown()
    assert grown < 8
    tried(
        f"{len(ENDLESS)} requests of {MEGABYTES} MB, no body", f"cut off; memory + {grown:.1f} MB"
    )


# Negative controls: plain uvicorn


@pytest.fixture(scope="module")
def tutorial(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with Service(tmp_path_factory.mktemp("tutorial"), command=TUTORIAL) as tutorial:
        yield tutorial


@pytest.mark.parametrize("name", ["no Host", "two Hosts", "a Host with a user"])
def test_control_plain_uvicorn_accepts_a_request_with_no_host_or_two_hosts(
    tutorial: Service, name: str, tried: Tried
) -> None:
    said = say(tutorial.port, MALFORMED[name].replace(HIDDEN, b""), patience=0.5)
    assert said.statuses == [200]
    tried(f"plain uvicorn, {name}", "200")


def test_control_plain_uvicorn_reads_endless_headers_into_memory(
    tutorial: Service, tried: Tried
) -> None:
    began = Peak(tutorial.pid)
    said = say(tutorial.port, endless("headers"), patience=1)
    grown = began.grown()
    assert said.statuses == [200]
    assert grown > MEGABYTES * 0.9
    tried(f"plain uvicorn, {MEGABYTES} MB of headers", f"200; memory + {grown:.0f} MB")


class Peak:
    """Measures the greatest growth of a process's memory since this object was made."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        Path(f"/proc/{pid}/clear_refs").write_text("5")  # forget the peak so far (proc(5))
        self._before = self._read()

    def _read(self) -> float:
        status = Path(f"/proc/{self._pid}/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024 / MB

    def grown(self) -> float:
        """Return the growth in megabytes."""
        return self._read() - self._before
