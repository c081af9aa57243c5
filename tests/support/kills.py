"""A load of many clients on a service that is killed over and over, and what was lost by it."""

import os
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import httpx2

from tests.support.service import Service
from tests.support.smtp_server import SmtpServer

CLIENTS = 16
DONE_WITHIN = 60.0  # seconds: a worker's lease, and the work
KILLS = int(os.environ.get("KILLS", "3"))  # `make torture` asks for more

_ID = re.compile(rb"^Message-ID: <([^@]+)@", re.MULTILINE)


@dataclass
class Tally:
    """Which tasks were answered 202, and how often each mail arrived."""

    accepted: set[str] = field(default_factory=set)
    delivered: Counter[str] = field(default_factory=Counter)
    given_up: set[str] = field(default_factory=set)

    @property
    def lost(self) -> set[str]:
        """Accepted, but neither delivered nor shown as failed."""
        return self.accepted - set(self.delivered) - self.given_up


def kill_under_load(service: Service, smtp_server: SmtpServer, *, kills: int) -> Tally:
    """Send from many clients while the service is killed at random instants, and started again.

    Returns once the service has nothing left to do.
    """

    def kill() -> None:
        service.kill()
        service.start()

    return disturb_under_load(service, smtp_server, kill, times=kills)


def disturb_under_load(
    service: Service, smtp_server: SmtpServer, disturb: Callable[[], None], *, times: int
) -> Tally:
    """Send from many clients while something bad happens at random instants; see above."""
    tally = Tally()
    with _load(service, tally):
        for _ in range(times):
            time.sleep(random.uniform(0.1, 0.6))
            disturb()
        time.sleep(0.2)
    _wait_until_done(service)
    _wait_until_quiet(smtp_server)
    tally.given_up = _failed(service)
    tally.delivered = Counter(
        match[1].decode() for mail in smtp_server.received if (match := _ID.search(mail.content))
    )
    return tally


@contextmanager
def _load(service: Service, tally: Tally) -> Iterator[None]:
    enough = threading.Event()
    clients = [
        threading.Thread(target=_client, args=(service.url, tally.accepted, enough))
        for _ in range(CLIENTS)
    ]
    for client in clients:
        client.start()
    try:
        yield
    finally:
        enough.set()
        for client in clients:
            client.join()


def _client(url: str, accepted: set[str], enough: threading.Event) -> None:
    with httpx2.Client(base_url=url, timeout=10) as client:
        while not enough.is_set():
            try:
                answer = client.post("/send-notification/ada@example.com")
                if answer.status_code == httpx2.codes.ACCEPTED:
                    accepted.add(answer.json()["id"])
            except httpx2.TransportError:
                time.sleep(0.05)  # it was killed; nothing was promised
            time.sleep(0.02)


def _wait_until_done(service: Service) -> None:
    """Wait until no task is unfinished, as far as the service can tell."""
    deadline = time.monotonic() + DONE_WITHIN
    while any(_some(service, status) for status in ("running", "retrying", "queued")):
        assert time.monotonic() < deadline, service.log[-10_000:]
        time.sleep(0.1)


def _some(service: Service, status: str) -> bool:
    answer = service.get("/tasks", params={"status": status, "limit": 1})
    return answer.status_code != httpx2.codes.NOT_FOUND and answer.json().get("data") != []


def _wait_until_quiet(smtp_server: SmtpServer) -> None:
    """Wait until no mail has come for a while: longer than any back-off of these tests."""
    before = -1
    while len(smtp_server.received) != before:
        before = len(smtp_server.received)
        time.sleep(1.0)


def _failed(service: Service) -> set[str]:
    answer = service.get("/tasks", params={"status": "failed", "limit": 100})
    if answer.status_code == httpx2.codes.NOT_FOUND:  # the tutorial's service cannot tell
        return set()
    return {task["id"] for task in answer.json()["data"]}
