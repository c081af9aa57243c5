"""While tasks run, a few requests at a time are answered; who dawdles holds up nobody."""

import asyncio
import socket
from contextlib import ExitStack
from pathlib import Path

import pytest

from app.api.turns import AT_ONCE, Turns
from tests.support.service import PATIENCE, Service, until
from tests.support.smtp_server import HANG, SmtpServer

CLIENTS = 100
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
    turns = Turns(lambda: busy)
    inside, most, order = 0, 0, list[int]()

    async def come(number: int) -> None:
        nonlocal inside, most
        async with turns.one():
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


def test_nobody_waits_for_a_client_that_dawdles(tmp_path: Path, smtp_server: SmtpServer) -> None:
    """Its turn comes when its body is there."""
    smtp_server.always["dot"] = HANG
    with ExitStack() as stack:
        service = Service(tmp_path, catcher=False, smtp_port=smtp_server.port)
        stack.enter_context(service)
        first = service.post("/send-notification/ada@example.com").json()["id"]
        task = f"/tasks/{first}"
        until(lambda: service.get(task).json()["status"] == "running", within=PATIENCE)
        for dawdler in DAWDLERS * AT_ONCE:
            slow = stack.enter_context(socket.create_connection(("127.0.0.1", service.port)))
            slow.sendall(dawdler)
        for _ in range(2 * AT_ONCE):
            answer = service.post("/send-notification/ada@example.com", json={})
            assert answer.status_code == 202
