"""Send from many clients during a fault such as a kill, and count lost and repeated mails."""

import random
import re
import threading
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import httpx2

from tests.support.service import Service, until
from tests.support.smtp_server import SmtpServer

CLIENTS = 16
PATIENCE = 60.0  # seconds: stop_sending for a lease to expire and for the tasks to run
QUIET = 1.0  # seconds without a mail: longer than the SMTP server takes for each

_ID = re.compile(rb"^Message-ID: <([^@]+)@", re.MULTILINE)
_BACKLOG = re.compile(r"^afterward_backlog\{.* (\S+)$", re.MULTILINE)


@dataclass
class Tally:
    """The tasks that were answered 202, and the mails that arrived."""

    accepted: set[str] = field(default_factory=set)
    given_up: set[str] = field(default_factory=set)
    delivered: Counter[str] = field(default_factory=Counter)  # task id, from the Message-ID
    renamed: int = 0  # copies of a mail with a Message-ID different from the first

    @property
    def lost(self) -> set[str]:
        """Tasks that were accepted, but neither delivered nor shown as failed."""
        return self.accepted - set(self.delivered) - self.given_up

    @property
    def copies(self) -> int:
        """The number of mails beyond the first for each task."""
        return self.delivered.total() - len(self.delivered)

    def __str__(self) -> str:
        """Summarise the tally in one line."""
        return (
            f"{len(self.lost):,} lost, {len(self.given_up)} given up, {self.copies:,} copies, "
            f"{self.renamed} of them under another Message-ID"
        )


def kill_under_load(
    service: Service, smtp_server: SmtpServer, *, kills: int, accepted: int
) -> Tally:
    """Kill and restart the service at random instants; see `disturb_under_load`."""

    def kill() -> None:
        service.kill()
        service.start()

    return disturb_under_load(service, smtp_server, kill, times=kills, accepted=accepted)


def disturb_under_load(
    service: Service,
    smtp_server: SmtpServer,
    disturb: Callable[[], None],
    *,
    times: int,
    accepted: int,
) -> Tally:
    """Send from many clients, and call `disturb` at `times` random instants meanwhile.

    At least `accepted` requests are answered 202. Return the tally when no task is left unfinished.
    """
    tally = Tally()
    with _load(service, tally):
        for nth in range(times):
            _wait_until_accepted(tally, random.uniform(nth, nth + 1) * accepted / times)
            time.sleep(random.uniform(0, 0.1))
            disturb()
        _wait_until_accepted(tally, accepted)
    _wait_until_done(service, smtp_server, len(tally.accepted))
    tally.given_up = _failed(service)
    _count(smtp_server, tally)
    return tally


@contextmanager
def _load(service: Service, tally: Tally) -> Iterator[None]:
    stop_sending = threading.Event()
    clients = [
        threading.Thread(target=_client, args=(service.url, tally.accepted, stop_sending))
        for _ in range(CLIENTS)
    ]
    for client in clients:
        client.start()
    try:
        yield
    finally:
        stop_sending.set()
        for client in clients:
            client.join()


def _client(url: str, accepted: set[str], stop_sending: threading.Event) -> None:
    """Request mails until `stop_sending` is set, each to a new recipient."""
    with httpx2.Client(base_url=url, timeout=10) as client:
        while not stop_sending.is_set():
            try:
                answer = client.post(f"/send-notification/{uuid.uuid4().hex}@example.com")
                if answer.status_code == httpx2.codes.ACCEPTED:
                    accepted.add(answer.json()["id"])
            except httpx2.TransportError:
                time.sleep(0.05)  # killed before it answered, so it promised nothing
            time.sleep(0.02)


def _wait_until_accepted(tally: Tally, number: float) -> None:
    until(lambda: len(tally.accepted) >= number, within=PATIENCE, what=number)


def _wait_until_done(service: Service, smtp_server: SmtpServer, tasks: int) -> None:
    if service.get("/metrics").status_code == httpx2.codes.NOT_FOUND:
        _wait_until_quiet(smtp_server)  # the tutorial's service has no backlog to ask for
    else:
        until(lambda: _backlog(service) == {0.0}, within=PATIENCE + tasks / 20)


def _backlog(service: Service) -> set[float]:
    """Return the distinct numbers of tasks in each unfinished state, all of one instant."""
    return {float(tasks) for tasks in _BACKLOG.findall(service.get("/metrics").text)}


def _wait_until_quiet(smtp_server: SmtpServer) -> None:
    before = -1
    while len(smtp_server.received) != before:
        before = len(smtp_server.received)
        time.sleep(QUIET)


def _failed(service: Service) -> set[str]:
    failed = service.get("/tasks", params={"status": "failed", "limit": 100}).json()
    return {task["id"] for task in failed.get("data", [])}


def _count(smtp_server: SmtpServer, tally: Tally) -> None:
    names = defaultdict[str, set[str]](set)
    for mail in smtp_server.received:
        if match := _ID.search(mail.content):
            task_id = match[1].decode()
            tally.delivered[task_id] += 1
            names[mail.recipients[0]].add(task_id)
    tally.renamed = sum(len(ids) - 1 for ids in names.values())
