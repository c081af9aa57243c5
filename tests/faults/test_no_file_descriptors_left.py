"""Clients open more idle connections than the process may have file descriptors.

The service closes excess connections, so that descriptors are left for its other work: the worker
still opens connections and sends mail, and the log can be written. The service logs the shortage in
a few lines, and does not spin. When the clients are gone, it answers again within two seconds.
"""

import socket
import sys
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx2

from tests.support.measures import cpu_share
from tests.support.service import COMMAND, PATIENCE, Service, until
from tests.support.smtp_server import SmtpServer, in_a_thread
from tests.support.torture import Tried, form

FILES = 128  # file descriptors that the process may open
CLIENTS = form(300, 1_000)
MAILS = form(20, 500)
RESERVE = 20  # descriptors that must stay free for work other than clients
LINES = 10  # the most log lines about the shortage
AT_MOST = form(PATIENCE, 2.0)  # seconds until the service has recovered

FEW_FILES = ("prlimit", f"--nofile={FILES}:{FILES}")
# The long keep-alive keeps the first clients connected until the crowd has arrived.
TUTORIAL = (
    *(*FEW_FILES, sys.executable, "-m", "uvicorn", "tests.support.tutorial:app"),
    *("--port={port}", "--no-access-log", "--timeout-keep-alive=600"),
)


@contextmanager
def crowd(port: int) -> Iterator[None]:
    """Keep CLIENTS idle connections open, and keep replacing the oldest with new ones."""
    gone = threading.Event()
    clients = deque[socket.socket]()

    def keep_connecting() -> None:
        while not gone.wait(0.02):
            for _ in range(5):
                clients.append(client := socket.socket())
                client.setblocking(False)
                client.connect_ex(("127.0.0.1", port))
            while len(clients) > CLIENTS:
                clients.popleft().close()

    connecting = threading.Thread(target=keep_connecting)
    connecting.start()
    try:
        until(lambda: len(clients) == CLIENTS, within=PATIENCE + CLIENTS / 50)
        yield
    finally:
        gone.set()
        connecting.join()
        for client in clients:
            client.close()


def test_mail_is_sent_without_free_descriptors_and_the_service_recovers(
    tmp_path: Path, tried: Tried
) -> None:
    server = SmtpServer()
    with (
        in_a_thread(server) as portal,
        Service(
            tmp_path,
            command=(*FEW_FILES, *COMMAND),
            catcher=False,
            smtp_port=server.port,
            retry_max_seconds=0.5,
            client_timeout_seconds=60,
        ) as service,
    ):
        portal.call(server.stop)
        tasks = [
            service.post("/send-notification/ada@example.com").json()["id"] for _ in range(MAILS)
        ]
        lines = len(service.log.splitlines())
        with crowd(service.port):
            portal.call(server.start)
            sent = until(lambda: len(server.received) == MAILS, within=PATIENCE + MAILS / 20)
            share = cpu_share(service.pid, 1.0)
            most = max(open_files(service.pid) for _ in range(100))
        back = until(lambda: answers(service.url), within=AT_MOST)
        told = [line for line in service.log.splitlines()[lines:] if "too many" in line]
        for task in tasks:
            service.wait_for(task)

    tried(
        f"{CLIENTS} idle clients, {FILES} descriptors",
        f"{MAILS} of {MAILS} mails sent in {sent:.1f} s, {share:.0%} of a processor, "
        f"{len(told)} lines; {FILES - most} descriptors left; answers again after {back:.2f} s",
    )
    assert most <= FILES - RESERVE
    assert share < 0.5
    assert 0 < len(told) <= LINES


def answers(url: str) -> bool:
    """Return whether a new client gets an answer."""
    try:
        return httpx2.get(f"{url}/livez", timeout=1).is_success
    except httpx2.TransportError:
        return False


def open_files(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def test_control_without_a_reserve_mail_is_lost(
    tmp_path: Path, smtp_server: SmtpServer, tried: Tried
) -> None:
    """The tutorial's service accepts clients until no descriptor is left, and tries a mail once."""
    with ExitStack() as stack:
        service = stack.enter_context(
            Service(tmp_path, command=TUTORIAL, smtp_port=smtp_server.port)
        )
        clients = [
            stack.enter_context(httpx2.Client(base_url=service.url, timeout=PATIENCE))
            for _ in range(20)
        ]
        for client in clients:
            client.get(
                "/livez"
            ).raise_for_status()  # opens the connection while descriptors are left
        with crowd(service.port):
            until(lambda: open_files(service.pid) == FILES, within=PATIENCE)
            answers = list[httpx2.Response]()

            def mail_fails() -> bool:
                # A client that leaves the crowd frees a descriptor for a moment. So send again.
                path = "/send-notification/ada@example.com"
                answers.extend(client.post(path) for client in clients)
                return "Too many open files" in service.log

            until(mail_fails, within=PATIENCE)
    lost = len(answers) - len(smtp_server.received)
    tried(f"the same, {len(answers)} mails with plain BackgroundTasks", f"{lost} lost")
    assert {answer.status_code for answer in answers} == {202}
    assert lost
