"""Clients follow `/events` and read nothing, while large mails pass.

The service holds little for them, and answers others as before.
"""

import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.support.measures import Peak, Pulse, idle_p99
from tests.support.service import COMMAND, PATIENCE, Service
from tests.support.torture import Tried, form

MOST_MB = 32
READERS = form(20, 200)
BATCHES = form(4, 16)  # of 1,000 mails; they fill the buffers on the way to a client
MAILS = form(80, 600)
LARGE = {"message": "x" * 900_000}
LATER = 0.1  # seconds that an answer may take more than in an idle service
HOARDING = (sys.executable, "-m", "tests.support.unbounded_event_streams")
SEND = "/send-notification/ada@example.com"


def test_readers_that_do_not_read_cost_little_memory(tmp_path: Path, tried: Tried) -> None:
    grown = growth(tmp_path, COMMAND)
    tried(f"{READERS} readers, {MAILS} mails of 0.9 MB", f"{grown:.0f} MB more")
    assert grown <= MOST_MB


def test_control_readers_that_hold_whole_tasks_take_all_the_memory(
    tmp_path: Path, tried: Tried
) -> None:
    grown = growth(tmp_path, HOARDING)
    tried("the same if readers hold whole tasks", f"{grown:.0f} MB more")
    assert grown > MOST_MB


def test_others_are_answered_while_many_follow_all_events(tmp_path: Path, tried: Tried) -> None:
    with served(tmp_path, COMMAND) as service:
        idle = idle_p99(service.url)
        with following(service, READERS), Pulse(service.url) as pulse:
            for _ in range(MAILS):
                service.post(SEND).raise_for_status()
        tried(f"{MAILS} mails, {READERS} readers", f"/livez p99 {pulse.p99 * 1000:.0f} ms")
        assert pulse.p99 <= idle + LATER


def served(directory: Path, command: Sequence[str]) -> Service:
    """A service that cuts no slow client off while the test runs."""
    return Service(
        directory,
        command=command,
        worker_concurrency=0,
        catcher=False,
        smtp_port=1,
        client_timeout_seconds=3600,
    )


def growth(directory: Path, command: Sequence[str]) -> float:
    """The megabytes that a service takes more while large mails pass readers that do not read."""
    with served(directory, command) as service, following(service, READERS):
        many = {"recipients": ["ada@example.com"] * 1000}
        for _ in range(BATCHES):
            service.post("/send-notifications", json=many).raise_for_status()
        service.post(SEND, json=LARGE).raise_for_status()
        peak = Peak(service.pid)
        for _ in range(MAILS):
            service.post(SEND, json=LARGE).raise_for_status()
        return peak.grown


@contextmanager
def following(service: Service, number: int) -> Iterator[None]:
    """Ask for `/events` so often, and read no more than the head of the answer."""
    with ExitStack() as stack:
        for _ in range(number):
            client = stack.enter_context(socket.socket())
            client.settimeout(PATIENCE)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect(("127.0.0.1", service.port))
            client.sendall(b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert client.recv(12) == b"HTTP/1.1 200"
        yield
