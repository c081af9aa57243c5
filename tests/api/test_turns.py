"""While tasks run, a few requests at a time are answered; who dawdles holds up nobody."""

import asyncio
import socket
from contextlib import ExitStack
from pathlib import Path

import pytest

from app.api.turns import TASKS_TO_A_REQUEST, Turns
from tests.support.service import PATIENCE, Service, until
from tests.support.smtp_server import SmtpServer

CLIENTS = 100
AT_ONCE = 8  # requests
TASKS = AT_ONCE * TASKS_TO_A_REQUEST
DAWDLERS = [
    (
        b"POST /send-notification/eve@example.com HTTP/1.1\r\nHost: localhost\r\n"
        b"Content-Type: application/json\r\nContent-Length: 1000\r\n\r\n{"
    ),
    (
        b"POST /upload HTTP/1.1\r\nHost: localhost\r\n"
        b"Content-Type: multipart/form-data; boundary=x\r\nContent-Length: 1000\r\n\r\n--x"
    ),
]


@pytest.mark.anyio
@pytest.mark.parametrize(("busy", "at_most"), [(True, AT_ONCE), (False, CLIENTS)])
async def test_there_is_a_limit_while_tasks_run(busy: bool, at_most: int) -> None:
    """And those who wait come in the order in which they came."""
    turns = Turns(lambda: busy, tasks=TASKS)
    inside, most, order = 0, 0, list[int]()

    async def come(number: int) -> None:
        nonlocal inside, most
        async with turns.take_turn():
            order.append(number)
            inside += 1
            most = max(most, inside)
            await asyncio.sleep(0.001)
            inside -= 1

    async with asyncio.TaskGroup() as clients:
        for number in range(CLIENTS):
            clients.create_task(come(number))
    assert most == at_most
    assert order == list(range(CLIENTS))


@pytest.mark.anyio
async def test_there_is_always_a_turn_for_one() -> None:
    async with Turns(lambda: True, tasks=1).take_turn():
        pass


def test_nobody_waits_for_a_client_that_dawdles(tmp_path: Path, smtp_server: SmtpServer) -> None:
    """Its turn comes when its body is there."""
    smtp_server.delay["dot"] = 0.02  # so that mails come and go all the time
    with ExitStack() as stack:
        service = Service(
            tmp_path, catcher=False, smtp_port=smtp_server.port, worker_concurrency=TASKS
        )
        stack.enter_context(service)
        many = {"recipients": ["ada@example.com"] * 1000}
        assert service.post("/send-notifications", json=many).status_code == 202
        until(lambda: smtp_server.received, within=PATIENCE)
        for dawdler in DAWDLERS * AT_ONCE:
            slow = stack.enter_context(socket.create_connection(("127.0.0.1", service.port)))
            slow.sendall(dawdler)
        for _ in range(2 * AT_ONCE):
            answer = service.post("/send-notification/ada@example.com", json={})
            assert answer.status_code == 202
        assert len(smtp_server.received) < 1000  # all the while, tasks came and went
