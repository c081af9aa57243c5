"""Clients that are silent, that send a byte at a time, or that never read the response.

The service disconnects each within 1.5 times CLIENT_TIMEOUT_SECONDS, even if there are many, and
serves other clients meanwhile. It does not disconnect a client that is slow but fast enough, or
that waits for the service.
"""

import asyncio
import contextlib
import json
import math
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.measures import Pulse
from tests.support.service import Service, files_below, until
from tests.support.tools import tool
from tests.support.torture import Tried, form

TUTORIAL = (sys.executable, "-m", "tests.support.tutorial")
DAWDLER = (sys.executable, "-m", "tests.support.slow_app")

TIMEOUT = form(2.0, 10.0)  # the long form takes the default
CUT_OFF_WITHIN = form(10.0, 15.0)
PAUSE = TIMEOUT / 10  # between two drops
KIB = 1024
MB = 1_000_000

HOST = b"Host: localhost\r\n"
UPLOAD = b"POST /upload HTTP/1.1\r\n" + HOST + b"Content-Type: multipart/form-data; boundary=b\r\n"
CHUNKED = b"Transfer-Encoding: chunked\r\n\r\n"
PART = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.txt"\r\n\r\n'


@dataclass(frozen=True)
class Slow:
    """A client that sends its opening at once, and then a drop in each pause."""

    opening: bytes
    drop: bytes = b""

    async def seconds_until_cut_off(self, port: int, *, at_most: float) -> float | None:
        """Return the seconds until the service disconnects, or None after `at_most` seconds."""
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        began = time.monotonic()
        try:
            writer.write(self.opening)
            while (waited := time.monotonic() - began) < at_most:
                try:
                    if not await asyncio.wait_for(reader.read(1 << 16), PAUSE):
                        return waited
                except TimeoutError:
                    writer.write(self.drop)
        except ConnectionError:
            return time.monotonic() - began
        finally:
            writer.close()
        return None


ALWAYS_SLOW = {
    "silent": Slow(b""),
    "half a request line": Slow(b"GET /liv"),
    "a head that drips": Slow(b"GET /livez HTTP/1.1\r\n" + HOST, b"X: y\r\n"),
    "empty lines that drip": Slow(b"", b"\r\n"),
}
BODIES = {
    "no body": Slow(UPLOAD + b"Content-Length: 100000\r\n\r\n"),
    "a body that drips": Slow(UPLOAD + b"Content-Length: 100000\r\n\r\n" + PART, b"x"),
    "chunks that drip": Slow(UPLOAD + CHUNKED + b"%x\r\n%b\r\n" % (len(PART), PART), b"1\r\nx\r\n"),
    "a chunk's extension that drips": Slow(UPLOAD + CHUNKED + b"1;", b"x"),
    "trailers that drip": Slow(UPLOAD + CHUNKED + b"0\r\n", b"X: y\r\n"),
    "a promised body, never sent": Slow(
        UPLOAD + b"Expect: 100-continue\r\nContent-Length: 100000\r\n\r\n"
    ),
    "a body that is refused, and drips on": Slow(
        b"POST /nowhere HTTP/1.1\r\n" + HOST + b"Content-Length: 100000\r\n\r\n", b"x"
    ),
    "empty lines after an answer": Slow(b"GET /livez HTTP/1.1\r\n" + HOST + b"\r\n", b"\r\n"),
    "half a request after an answer": Slow(
        b"GET /livez HTTP/1.1\r\n" + HOST + b"\r\n" + b"GET /livez HTTP/1.1\r\n" + HOST, b"X: y\r\n"
    ),
}
SLOW = ALWAYS_SLOW | BODIES


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    directory = tmp_path_factory.mktemp("slow")
    with Service(directory, client_timeout_seconds=TIMEOUT) as service:
        yield service


def test_slow_clients_of_every_kind_are_disconnected(service: Service, tried: Tried) -> None:
    """Several of each kind run at the same time, while a normal client requests /livez."""
    crowd = list(SLOW.items()) * form(4, 40)
    with Pulse(service.url, anew=True) as normal_client:
        seconds = cut_off(service, [slow for _, slow in crowd])
    kept = {name for (name, _), passed in zip(crowd, seconds, strict=True) if passed is None}
    assert not kept
    assert [name for name in files_below(service.directory / "uploads") if "tmp" in name] == []
    slowest = max(passed for passed in seconds if passed is not None)
    tried(
        f"{len(crowd)} slow clients of {len(SLOW)} kinds, {TIMEOUT:g} s allowed",
        f"0 left after {slowest:.1f} s; /livez took {max(normal_client.seconds):.3f} s at most",
    )


def test_hundreds_of_silent_sockets_do_not_keep_other_clients_out(
    service: Service, tried: Tried
) -> None:
    number = form(150, 500)
    with Pulse(service.url, anew=True) as normal_client:
        seconds = cut_off(service, [ALWAYS_SLOW["a head that drips"]] * number)
    assert None not in seconds
    assert max(normal_client.seconds) < form(CUT_OFF_WITHIN, 2)
    tried(
        f"{number} sockets at once",
        f"all cut off; /livez took {max(normal_client.seconds):.3f} s at most",
    )


def test_empty_lines_before_a_head_do_not_extend_its_timeout(service: Service) -> None:
    """Otherwise a client could double its time with a head that begins just before the timeout."""

    async def seconds_for_the_head() -> float:
        reader, writer = await asyncio.open_connection("127.0.0.1", service.port)
        began = math.inf
        try:
            for drop in [b"\r\n"] * 9 + [b"G", b"E", b"T", b" ", b"/"] * 4:
                if drop == b"G":
                    began = min(began, time.monotonic())
                writer.write(drop)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(reader.read(1 << 16), PAUSE)
                    break
        except ConnectionError:
            pass
        writer.close()
        return time.monotonic() - began

    assert asyncio.run(seconds_for_the_head()) < TIMEOUT


@pytest.mark.parametrize("half_closed", [False, True], ids=["open", "half-closed"])
def test_a_client_that_never_reads_a_download_is_disconnected(
    service: Service, tried: Tried, *, half_closed: bool
) -> None:
    """This includes a half-closed client, which the service keeps connected for its response."""
    before = service.log.count('"doing":"reading"')
    size = 16 * MB
    content = b"x" * size
    upload = service.post("/upload", files={"file": ("a.bin", content)}).json()
    service.wait_for(upload["id"])
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 * KIB)
        connection.connect(("127.0.0.1", service.port))
        path = f"/uploads/{upload['upload']['id']}/content"
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        if half_closed:
            connection.shutdown(socket.SHUT_WR)
        seconds = until(
            lambda: service.log.count('"doing":"reading"') > before,
            within=CUT_OFF_WITHIN,
            what=service.log,
        )
        # It can then read only the bytes that were already in the system's buffers.
        connection.settimeout(5)
        read = 0
        try:
            while block := connection.recv(1 << 20):
                read += len(block)
        except ConnectionError:
            pass
    assert read < size
    what = "a half-closed client" if half_closed else "a client"
    tried(f"a download of 16 MB that {what} does not read", f"cut off after {seconds:.1f} s")


# Clients that must not be disconnected


def test_a_slow_but_steady_client_is_served(service: Service, tried: Tried) -> None:
    """It sends 64 KiB in less than the timeout, several times, and takes longer in total."""
    steps, drops = 4, 8
    content = b"x" * (steps * 64 * KIB)
    body = PART + content + b"\r\n--b--\r\n"
    drop = 64 * KIB // drops
    with socket.create_connection(("127.0.0.1", service.port), timeout=5) as connection:
        connection.sendall(UPLOAD + b"Content-Length: %d\r\n\r\n" % len(body))
        began = time.monotonic()
        for start in range(0, len(body), drop):
            connection.sendall(body[start : start + drop])
            time.sleep(TIMEOUT * 0.5 / drops)
        seconds = time.monotonic() - began
        answer = connection.recv(1 << 16)
    assert answer.startswith(b"HTTP/1.1 202 ")
    assert seconds > TIMEOUT * 1.5
    tried(f"64 KiB every {TIMEOUT * 0.5:.1f} s", f"served after {seconds:.1f} s")


def test_an_event_stream_is_not_disconnected(service: Service, tried: Tried) -> None:
    with service.client.stream("GET", "/events") as stream:
        began = time.monotonic()
        time.sleep(TIMEOUT * 2)
        task = service.post("/send-notification/ada@example.com").json()
        # Events of uploads from earlier tests may come before.
        events = (line for line in stream.iter_lines() if line.startswith("data: "))
        assert task["id"] in (json.loads(line.removeprefix("data: "))["id"] for line in events)
        seconds = time.monotonic() - began
    tried("GET /events", f"still connected after {seconds:.1f} s")


def test_a_client_that_waits_for_the_service_is_not_disconnected(
    tmp_path: Path, tried: Tried
) -> None:
    """The client may have sent its request, or have a body that the service does not read yet.

    Its timeout starts anew when the service reads again.
    """
    seconds = TIMEOUT * 2
    answers: list[bytes] = []

    def wait(port: int, size: int) -> None:
        at_once = min(size, 100 * KIB)  # more than the server buffers before the app reads
        with socket.create_connection(("127.0.0.1", port), timeout=seconds + 10) as connection:
            head = f"POST /work?{seconds} HTTP/1.1\r\nContent-Length: {size}\r\n"
            connection.sendall(head.encode() + HOST + b"\r\n" + b"x" * at_once)
            time.sleep(seconds + TIMEOUT / 2)
            connection.sendall(b"x" * (size - at_once))
            answers.append(connection.recv(1 << 16))

    with Service(tmp_path, command=DAWDLER, client_timeout_seconds=TIMEOUT) as dawdler:
        clients = [
            threading.Thread(target=wait, args=(dawdler.port, size)) for size in (0, 110 * KIB)
        ]
        for client in clients:
            client.start()
        for client in clients:
            client.join()
        assert "client too slow" not in dawdler.log
    assert [answer[:12] for answer in answers] == [b"HTTP/1.1 200"] * 2
    tried(f"2 requests that take {seconds:g} s", "2 answers")


# A program for such attacks: slowhttptest


MODES = {"slow headers": ["-H"], "a slow body": ["-B", "-s", "100000", "-t", "POST"]}
JUDGES = form(50, 500)  # connections


@pytest.mark.parametrize("mode", list(MODES)[: form(1, 2)])
def test_slowhttptest_cannot_hold_its_connections(
    service: Service, tmp_path: Path, mode: str, tried: Tried
) -> None:
    with slowhttptest(tmp_path, *MODES[mode], "-u", f"{service.url}/process/") as judge:
        said = re.sub(r"\x1b\[[0-9;]*m", "", judge.communicate(timeout=60)[0])
    assert "Exit status: No open connections left" in said, said
    assert service.get("/livez").is_success
    lasted = re.search(r"ended on (\d+)", said)
    tried(f"slowhttptest, {mode}, {JUDGES} connections", f"0 left after {lasted and lasted[1]} s")


@pytest.mark.long_form
def test_slowhttptest_cannot_hold_downloads(service: Service, tmp_path: Path, tried: Tried) -> None:
    """In this mode slowhttptest notices no disconnect, so the test reads the service's log."""
    upload = service.post("/upload", files={"file": ("a.bin", b"x" * 16 * MB)}).json()
    service.wait_for(upload["id"])
    address = f"{service.url}/uploads/{upload['upload']['id']}/content"
    before = service.log.count('"doing":"reading"')
    reading = ["-X", "-w", "1", "-y", "2", "-z", "1", "-n", "1", "-k", "1"]
    with slowhttptest(tmp_path, *reading, "-u", address) as judge:
        seconds = until(
            lambda: service.log.count('"doing":"reading"') - before >= JUDGES,
            within=CUT_OFF_WITHIN * 3,  # slowhttptest takes a while to connect
        )
        assert service.get("/livez").is_success
        judge.kill()
    tried(f"slowhttptest, slow reading, {JUDGES} connections", f"0 left after {seconds:.1f} s")


def slowhttptest(directory: Path, *arguments: str) -> "subprocess.Popen[str]":
    """Start slowhttptest with JUDGES connections, for longer than the service allows."""
    numbers = ["-c", JUDGES, "-r", JUDGES, "-i", 1, "-x", 10, "-p", 2, "-l", 60]
    command = [tool("slowhttptest"), *arguments, *map(str, numbers)]
    return subprocess.Popen(command, cwd=directory, stdout=subprocess.PIPE, text=True)


# Negative controls: plain uvicorn


def test_control_plain_uvicorn_keeps_slow_clients(tmp_path: Path, tried: Tried) -> None:
    number = form(5, 100)
    with Service(tmp_path, command=TUTORIAL) as tutorial:
        seconds = cut_off(tutorial, list(ALWAYS_SLOW.values()) * number)
    assert seconds == [None] * len(seconds)
    tried(
        f"plain uvicorn, {len(seconds)} slow clients",
        f"all {len(seconds)} still connected after {CUT_OFF_WITHIN:g} s",
    )


def cut_off(service: Service, crowd: list[Slow]) -> list[float | None]:
    """Return the seconds until each client is disconnected, or None if it is not in time."""

    async def wait() -> list[float | None]:
        return await asyncio.gather(
            *(slow.seconds_until_cut_off(service.port, at_most=CUT_OFF_WITHIN) for slow in crowd)
        )

    return asyncio.run(wait())
