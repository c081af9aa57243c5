"""Clients that open `/events` and never read, while tasks with large mails are queued.

The service needs little memory for them, and answers other clients as before.
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
# Of 1,000 mails; their events fill the network buffers between service and client.
BATCHES = form(4, 16)
MAILS = form(80, 600)
LARGE = {"message": "x" * 900_000}
LATER = 0.1  # seconds that a response may take longer than in an idle service
HOARDING = (sys.executable, "-m", "tests.support.unbounded_event_streams")
SEND = "/send-notification/ada@example.com"


def test_clients_that_never_read_events_need_little_memory(tmp_path: Path, tried: Tried) -> None:
    grown = growth(tmp_path, COMMAND)
    tried(f"{READERS} readers, {MAILS} mails of 0.9 MB", f"{grown:.0f} MB more")
    assert grown <= MOST_MB


def test_control_readers_that_hold_whole_tasks_need_much_memory(
    tmp_path: Path, tried: Tried
) -> None:
    grown = growth(tmp_path, HOARDING)
    tried("the same, with readers that hold whole tasks", f"{grown:.0f} MB more")
    assert grown > MOST_MB


def test_other_clients_are_answered_while_many_follow_all_events(
    tmp_path: Path, tried: Tried
) -> None:
    with served(tmp_path, COMMAND) as service:
        idle = idle_p99(service.url)
        with following(service, READERS), Pulse(service.url) as pulse:
            for _ in range(MAILS):
                service.post(SEND).raise_for_status()
        tried(f"{MAILS} mails, {READERS} readers", f"/livez p99 {pulse.p99 * 1000:.0f} ms")
        assert pulse.p99 <= idle + LATER


def served(directory: Path, command: Sequence[str]) -> Service:
    """Make a service that disconnects no slow client during the test."""
    return Service(
        directory,
        command=command,
        worker_concurrency=0,
        catcher=False,
        smtp_port=1,
        client_timeout_seconds=3600,
    )


def growth(directory: Path, command: Sequence[str]) -> float:
    """Return the growth of memory, in MB, while large mails are queued and no reader reads."""
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
    """Open `/events` so many times, and read no more than the beginning of each response."""
    with ExitStack() as stack:
        for _ in range(number):
            client = stack.enter_context(socket.socket())
            client.settimeout(PATIENCE)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect(("127.0.0.1", service.port))
            client.sendall(b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert client.recv(12) == b"HTTP/1.1 200"
        yield
