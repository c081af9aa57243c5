"""Clients hold more idle connections than the process may have file descriptors.

Those that are too many are turned away, so that descriptors are left for everything else: the
worker goes on sending, over new connections too, and the log can be written. The trouble is logged,
in a few lines, and the process does not spin. Once the clients are gone the service answers again
within two seconds.
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

FILES = 128  # descriptors of the process
CLIENTS = form(300, 1_000)
MAILS = form(20, 500)
RESERVE = 20  # descriptors that are left for everything but clients, at least
LINES = 10  # about the trouble, at most
AT_MOST = form(PATIENCE, 2.0)  # seconds until all is well again

FEW_FILES = ("prlimit", f"--nofile={FILES}:{FILES}")
# The clients that are there first stay connected, however long the crowd takes to come.
TUTORIAL = (
    *(*FEW_FILES, sys.executable, "-m", "uvicorn", "tests.support.tutorial:app"),
    *("--port={port}", "--no-access-log", "--timeout-keep-alive=600"),
)


@contextmanager
def crowd(port: int) -> Iterator[None]:
    """Clients that connect and say nothing: so many at once, and there is always another one."""
    gone = threading.Event()
    clients = deque[socket.socket]()

    def throng() -> None:
        while not gone.wait(0.02):
            for _ in range(5):
                clients.append(client := socket.socket())
                client.setblocking(False)
                client.connect_ex(("127.0.0.1", port))
            while len(clients) > CLIENTS:
                clients.popleft().close()

    thronging = threading.Thread(target=throng)
    thronging.start()
    try:
        until(lambda: len(clients) == CLIENTS, within=PATIENCE + CLIENTS / 50)
        yield
    finally:
        gone.set()
        thronging.join()
        for client in clients:
            client.close()


def test_the_worker_goes_on_and_the_service_comes_back(tmp_path: Path, tried: Tried) -> None:
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
    """Whether a new client gets an answer."""
    try:
        return httpx2.get(f"{url}/livez", timeout=1).is_success
    except httpx2.TransportError:
        return False


def open_files(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def test_control_without_a_reserve_mail_is_lost(
    tmp_path: Path, smtp_server: SmtpServer, tried: Tried
) -> None:
    """The tutorial's service, which takes every client that it can, and tries each mail once."""
    with ExitStack() as stack:
        service = stack.enter_context(
            Service(tmp_path, command=TUTORIAL, smtp_port=smtp_server.port)
        )
        clients = [
            stack.enter_context(httpx2.Client(base_url=service.url, timeout=PATIENCE))
            for _ in range(20)
        ]
        for client in clients:
            client.get("/livez").raise_for_status()  # while there is room
        with crowd(service.port):
            until(lambda: open_files(service.pid) == FILES, within=PATIENCE)
            answers = list[httpx2.Response]()

            def none_is_left() -> bool:
                # One that a client of the crowd has given back is enough for a while.
                path = "/send-notification/ada@example.com"
                answers.extend(client.post(path) for client in clients)
                return "Too many open files" in service.log

            until(none_is_left, within=PATIENCE)
    lost = len(answers) - len(smtp_server.received)
    tried(f"the same, {len(answers)} mails with plain BackgroundTasks", f"{lost} lost")
    assert {answer.status_code for answer in answers} == {202}
    assert lost
