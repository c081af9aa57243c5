"""First stop: a courtesy. A BackgroundTasks task runs after the response, and a crash loses it."""

import asyncio
import threading
import time
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path

import httpx2
import pytest
import uvicorn
from fastapi import BackgroundTasks, FastAPI
from fastapi.testclient import TestClient

from app.main import create_app
from tests.support.service import free_port, settings_in


def test_the_test_client_waits_for_background_tasks(tmp_path: Path) -> None:
    """So a test can check their effect at once."""
    with TestClient(create_app(settings_in(tmp_path, catcher=False))) as client:
        answer = client.post("/test-task/")

        assert answer.status_code == 202
        assert answer.json() == {"message": "Test task queued"}
        assert (tmp_path / "log.txt").read_text() == "test task\n"


def test_a_real_server_answers_before_the_task_runs(tutorial: "Tutorial") -> None:
    """The task waits for the client to continue, and the client has its response already."""
    answer = httpx2.post(f"{tutorial.url}/slow")

    assert answer.status_code == 202
    assert tutorial.log == []
    tutorial.may_go_on.set()
    tutorial.wait_until_logged("slow")


def test_with_plain_background_tasks_an_error_skips_the_next_tasks(tutorial: "Tutorial") -> None:
    """The server also closes the connection, although the response did not announce it."""
    connection = HTTPConnection("127.0.0.1", tutorial.port)
    connection.request("POST", "/raise")
    answer = connection.getresponse()
    answer.read()

    assert answer.status == 202
    assert not answer.will_close  # the response has no "Connection: close"
    assert connection.sock.recv(1) == b""  # but the server closed the connection
    connection.close()
    assert tutorial.log == []


def test_courtesies_of_the_service_log_their_errors_so_the_next_tasks_run(tmp_path: Path) -> None:
    """The second of three tasks raises an error."""
    with TestClient(create_app(settings_in(tmp_path, catcher=False))) as client:
        assert client.post("/multiple-tasks/").status_code == 202

        assert (tmp_path / "log.txt").read_text() == "first task\nsecond task\n"


class Tutorial:
    """A plain FastAPI app on a real server, in a thread."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.may_go_on = threading.Event()
        self.app = FastAPI()
        self.app.post("/slow", status_code=202)(self._slow)
        self.app.post("/raise", status_code=202)(self._raise)
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.server = uvicorn.Server(
            uvicorn.Config(self.app, port=self.port, log_level="critical", lifespan="off")
        )

    async def _slow(self, background_tasks: BackgroundTasks) -> None:
        async def task() -> None:
            await asyncio.to_thread(self.may_go_on.wait, 10)
            self.log.append("slow")

        background_tasks.add_task(task)

    async def _raise(self, background_tasks: BackgroundTasks) -> None:
        async def failing() -> None:
            raise RuntimeError("nobody catches this")

        background_tasks.add_task(failing)
        background_tasks.add_task(self.log.append, "never")

    def wait_until_logged(self, line: str) -> None:
        """Wait for a line in the log."""
        deadline = time.monotonic() + 10
        while line not in self.log:
            assert time.monotonic() < deadline
            time.sleep(0.01)


@pytest.fixture
def tutorial() -> Iterator[Tutorial]:
    """A running server of the tutorial's app."""
    tutorial = Tutorial()
    thread = threading.Thread(target=tutorial.server.run)
    thread.start()
    while not tutorial.server.started:
        time.sleep(0.01)
    yield tutorial
    tutorial.server.should_exit = True
    thread.join()
