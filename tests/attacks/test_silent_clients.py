"""Clients that announce a body, with or without an Idempotency-Key, and send none of it.

They hold no turn that other requests need: while tasks run, other clients are answered as fast as
without them.
"""

import socket
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.service import COMMAND, PATIENCE, Service, until
from tests.support.smtp_server import SmtpServer
from tests.support.torture import Tried, form

SILENT = form(12, 100)  # clients at a time, more than there are turns
ROUNDS = form(5, 50)
MAILS = 1000  # in a batch, the greatest number allowed
PATIENT_SECONDS = 1  # the service's timeout for a silent client
LATER = 0.1  # seconds that the silent clients may add to a response

HEADS = [
    "POST /test-task/",
    "POST /send-notification/eve@example.com",
    "POST /send-notifications",
    "POST /tasks/unknown/retry",
    "POST /tasks/unknown/cancel",
    "POST /upload",
    "DELETE /uploads/unknown",
    "GET /tasks",
    "GET /livez",
]
PATHS = ["/livez", "/readyz", "/tasks?limit=1"]
HASTY = (sys.executable, "-m", "tests.support.early_turns")


@pytest.mark.parametrize("key", [True, False], ids=["with a key", "without"])
def test_silent_clients_do_not_delay_other_clients(
    tmp_path: Path, smtp_server: SmtpServer, tried: Tried, key: bool
) -> None:
    alone, among_them = answer_times(tmp_path, smtp_server, key=key)
    tried(
        f"{SILENT} silent clients, {ROUNDS} times {len(PATHS)} requests",
        f"{among_them * 1000:.0f} ms, and {alone * 1000:.0f} ms without them",
    )
    assert among_them < alone + LATER


def test_control_a_service_that_takes_the_turn_before_the_body_stops_answering(
    tmp_path: Path, smtp_server: SmtpServer, tried: Tried
) -> None:
    """There are few turns, and each silent client holds one."""
    alone, among_them = answer_times(tmp_path, smtp_server, HASTY, key=True)
    tried(
        f"the turn comes before the body: {SILENT} silent clients",
        f"{among_them * 1000:.0f} ms, and {alone * 1000:.0f} ms without them",
    )
    assert among_them > alone + LATER


def answer_times(
    directory: Path, smtp_server: SmtpServer, command: Sequence[str] = COMMAND, *, key: bool
) -> tuple[float, float]:
    """Return the seconds of the slowest GET: without silent clients, and with them.

    Each is the median of several rounds, because other processes may delay some of them.
    """
    smtp_server.delay["dot"] = 0.02  # so that tasks end and begin all the time
    with Service(
        directory,
        command=command,
        catcher=False,
        smtp_port=smtp_server.port,
        client_timeout_seconds=PATIENT_SECONDS,
    ) as service:
        alone, among_them = list[float](), list[float]()
        for _ in range(ROUNDS):
            keep_busy(service, smtp_server)
            alone.append(slowest(service))
            with ExitStack() as stack:
                for number in range(SILENT):
                    be_silent(service, number, stack, key=key)
                time.sleep(0.2)  # for the service to read their heads
                among_them.append(slowest(service))
    return statistics.median(alone), statistics.median(among_them)


def keep_busy(service: Service, smtp_server: SmtpServer) -> None:
    """Queue a batch, and wait until its first mail arrives."""
    before = len(smtp_server.received)
    many = {"recipients": ["ada@example.com"] * MAILS}
    assert service.post("/send-notifications", json=many).status_code == 202
    until(lambda: len(smtp_server.received) > before, within=PATIENCE)


def slowest(service: Service) -> float:
    """Request each of PATHS, and return the seconds of the slowest response."""
    seconds = []
    for path in PATHS:
        began = time.monotonic()
        assert service.get(path, timeout=PATIENCE).is_success
        seconds.append(time.monotonic() - began)
    return max(seconds)


def be_silent(service: Service, number: int, stack: ExitStack, *, key: bool) -> None:
    """Send the head of a request, and never its body."""
    head = f"{HEADS[number % len(HEADS)]} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n"
    if key:
        head += f"Idempotency-Key: {time.monotonic_ns()}\r\n"
    if "upload" in head:
        head += "Content-Type: multipart/form-data; boundary=x\r\n"
    client = stack.enter_context(socket.create_connection(("127.0.0.1", service.port)))
    client.sendall(f"{head}\r\n".encode())
