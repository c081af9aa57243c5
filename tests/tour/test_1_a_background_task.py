"""First stop: a courtesy. BackgroundTasks run after the response, and promise nothing."""

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
    """So a test may look for their effect at once."""
    with TestClient(create_app(settings_in(tmp_path, catcher=False))) as client:
        answer = client.post("/test-task/")

        assert answer.status_code == 202
        assert answer.json() == {"message": "Test task queued"}
        assert (tmp_path / "log.txt").read_text() == "test task\n"


def test_a_real_server_answers_before_the_task_has_run(tutorial: "Tutorial") -> None:
    """The task below waits for the client, which has its response by then."""
    answer = httpx2.post(f"{tutorial.url}/slow")

    assert answer.status_code == 202
    assert tutorial.log == []
    tutorial.may_go_on.set()
    tutorial.wait_until_logged("slow")


def test_plain_tasks_that_raise_skip_the_others_of_their_request(tutorial: "Tutorial") -> None:
    """This is what BackgroundTasks does today; and it closes the connection under the client."""
    connection = HTTPConnection("127.0.0.1", tutorial.port)
    connection.request("POST", "/raise")
    answer = connection.getresponse()
    answer.read()

    assert answer.status == 202
    assert not answer.will_close  # as far as the client was told
    assert connection.sock.recv(1) == b""  # but it was closed
    connection.close()
    assert tutorial.log == []


def test_ours_log_their_errors_themselves_so_the_others_still_run(tmp_path: Path) -> None:
    """The second of three tasks raises."""
    with TestClient(create_app(settings_in(tmp_path, catcher=False))) as client:
        assert client.post("/multiple-tasks/").status_code == 202

        assert (tmp_path / "log.txt").read_text() == "first task\nsecond task\n"


class Tutorial:
    """A plain FastAPI app on a real server in a thread."""

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
    """The tutorial's server, running."""
    tutorial = Tutorial()
    thread = threading.Thread(target=tutorial.server.run)
    thread.start()
    while not tutorial.server.started:
        time.sleep(0.01)
    yield tutorial
    tutorial.server.should_exit = True
    thread.join()
