"""While tasks run, only a few requests are handled at a time; slow clients delay no request."""

import asyncio
import re
import socket
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any, get_args

import pytest
from fastapi import FastAPI, Request
from fastapi.dependencies.models import Dependant
from fastapi.routing import APIRoute
from fastapi.testclient import TestClient

from app.api.dependencies import CatcherDep, HealthDep, PendingUploadsDep, UploadsDep
from app.api.turns import TASKS_TO_A_REQUEST, Turns
from tests.api.requests import upload_of
from tests.support.service import PATIENCE, Service, until
from tests.support.smtp_server import SmtpServer

CLIENTS = 100
AT_ONCE = 8  # requests
TASKS = AT_ONCE * TASKS_TO_A_REQUEST
FROM_A_PAGE = {"Sec-Fetch-Site": "same-origin"}  # forms need it
SLOW_REQUESTS = [
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
async def test_the_number_of_requests_at_a_time_is_limited_while_tasks_run(
    busy: bool, at_most: int
) -> None:
    """Waiting requests are handled in the order in which they arrived."""
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
async def test_at_least_one_request_is_handled_at_a_time() -> None:
    async with Turns(lambda: True, tasks=1).take_turn():
        pass


def routes_with(client: TestClient, *dependencies: Any) -> Iterator[tuple[str, str]]:
    """Yield the method and the path of each route with one of these parameters."""
    wanted = {get_args(dependency)[1].dependency for dependency in dependencies}
    assert isinstance(client.app, FastAPI)
    for route in client.app.routes:
        if isinstance(route, APIRoute) and wanted & set(_calls(route.dependant)):
            for method in route.methods or ():
                yield method, route.path


def _calls(dependant: Dependant) -> Iterator[Any]:
    for dependency in dependant.dependencies:
        yield dependency.call
        yield from _calls(dependency)


def test_a_request_that_may_wait_for_more_than_the_database_takes_no_turn(
    idle_client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may wait for the store of uploads, for the catcher's files, or for the health checks."""
    with_turn = list[str]()

    def take_turn() -> nullcontext[None]:
        with_turn.append(path)
        return nullcontext()

    monkeypatch.setattr(idle_client.app_state["turns"], "take_turn", take_turn)
    routes = set(routes_with(idle_client, UploadsDep, CatcherDep, HealthDep))
    assert {path for _, path in routes} > {"/metrics", "/inbox", "/uploads/{upload_id}/content"}
    for method, path in routes | {("GET", "/tasks")}:
        idle_client.request(method, re.sub("{.*?}", "1", path), headers=FROM_A_PAGE)
    assert with_turn == ["/tasks"]


def test_no_upload_is_read_before_its_route_runs(
    idle_client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A large file would not fit into the memory."""

    async def refuse(_: Request) -> bytes:
        raise AssertionError

    monkeypatch.setattr(Request, "body", refuse)
    routes = set(routes_with(idle_client, PendingUploadsDep))
    assert routes == {("POST", path) for path in ("/upload", "/upload/", "/board/uploads")}
    for _, path in routes:
        assert not idle_client.post(path, headers=FROM_A_PAGE, **upload_of().options).is_error


@pytest.mark.thorough
def test_a_client_that_sends_its_body_slowly_delays_no_other_request(
    tmp_path: Path, smtp_server: SmtpServer
) -> None:
    """A request waits for its turn only when its body has arrived, so a slow body holds no turn."""
    smtp_server.delay["dot"] = 0.02  # so that tasks end and begin all the time
    with ExitStack() as stack:
        service = Service(
            tmp_path, catcher=False, smtp_port=smtp_server.port, worker_concurrency=TASKS
        )
        stack.enter_context(service)
        many = {"recipients": ["ada@example.com"] * 1000}
        assert service.post("/send-notifications", json=many).status_code == 202
        until(lambda: smtp_server.received, within=PATIENCE)
        for slow_request in SLOW_REQUESTS * AT_ONCE:
            slow = stack.enter_context(socket.create_connection(("127.0.0.1", service.port)))
            slow.sendall(slow_request)
        for _ in range(2 * AT_ONCE):
            answer = service.post("/send-notification/ada@example.com", json={})
            assert answer.status_code == 202
        assert len(smtp_server.received) < 1000  # tasks were still running
