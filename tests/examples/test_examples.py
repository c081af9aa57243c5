"""Start each example with the command in its docstring, and check what the docstring says."""

import ast
import contextlib
import re
import shlex
import sqlite3
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.support.postgres import Postgres
from tests.support.service import PATIENCE, ROOT, Json, Process, Service, until

SEND = "/send-notification/ada@example.com"
_SENT = re.compile(r"^sent to (\S+?)(?::.*)?(?: by worker \d+)?$", re.MULTILINE)
_COMMAND = re.compile(r"^ +\.venv/bin/((?:uvicorn|python) .+)$", re.MULTILINE)


def commands(example: str) -> list[list[str]]:
    """Read from an example's docstring the commands that start its processes."""
    docstring = ast.get_docstring(ast.parse((ROOT / f"examples/{example}.py").read_text()))
    found = [shlex.split(line, comments=True) for line in _COMMAND.findall(docstring or "")]
    return [
        [sys.executable, *(["-m", program] if program == "uvicorn" else []), *rest]
        for program, *rest in found
    ]


class Example(Service):
    """An example's server, with its files in `directory`."""

    def __init__(self, directory: Path, example: str, **settings: Any) -> None:
        command = [*commands(example)[0], "--port", "{port}"]
        super().__init__(directory, command=command, pythonunbuffered=1, **settings)

    def _answers(self) -> bool:
        with contextlib.suppress(httpx2.TransportError):
            return self.get("/openapi.json").is_success
        return False

    @property
    def sent(self) -> Counter[str]:
        """Count the mails to each recipient that the example has printed so far."""
        return Counter(_SENT.findall(self.log))

    def until_sent(self, recipient: str) -> None:
        """Wait until a mail is sent."""
        until(lambda: self.sent[recipient], within=PATIENCE, what=f"sent to {recipient}")


@contextmanager
def smtp_is_down(directory: Path) -> Iterator[None]:
    """Run `touch smtp-is-down` before the block, and `rm smtp-is-down` after it."""
    (directory / "smtp-is-down").touch()
    yield
    (directory / "smtp-is-down").unlink()


@pytest.mark.parametrize("example", ["1_background_task", "2_smallest", "3_durable_task"])
def test_the_first_examples_are_short(example: str) -> None:
    assert len((ROOT / f"examples/{example}.py").read_text().splitlines()) < 110


# 1_background_task.py


@pytest.mark.thorough
def test_a_kill_takes_a_background_task(tmp_path: Path) -> None:
    with Example(tmp_path, "1_background_task") as server:
        assert server.post(SEND).status_code == httpx2.codes.ACCEPTED
        server.until_sent("ada@example.com")

        assert server.post("/send-notification/bob@example.com").is_success
        server.kill()
        server.start()
        assert server.post("/send-notification/eve@example.com").is_success
        server.until_sent("eve@example.com")  # so Bob's mail would have been sent before
        assert server.sent == {"ada@example.com": 1, "eve@example.com": 1}


# 2_smallest.py


def newest(server: Example) -> Json:
    """Read the newest task of 2_smallest.py."""
    task: Json = server.get("/tasks").json()[0]
    return task


def until_newest(server: Example, **expected: object) -> Json:
    """Wait until the newest task of 2_smallest.py has these values."""
    until(lambda: expected.items() <= newest(server).items(), within=PATIENCE, what=expected)
    return newest(server)


def set_attempts(directory: Path, attempts: int) -> None:
    """Let the tasks of 2_smallest.py have had so many attempts, while it does not run."""
    with contextlib.closing(sqlite3.connect(directory / "smallest.db")) as database, database:
        database.execute("UPDATE tasks SET attempts = ?", (attempts,))


def test_the_smallest_survives_a_kill(tmp_path: Path) -> None:
    with Example(tmp_path, "2_smallest") as server:
        assert server.post(SEND).json() == {"id": 1}
        until_newest(server, status="running")
        server.kill()
        assert not server.sent
        server.start()
        server.until_sent("ada@example.com")
        assert until_newest(server, status="succeeded")["attempts"] == 2


@pytest.mark.thorough
def test_the_smallest_tries_again_until_smtp_is_back(tmp_path: Path) -> None:
    with Example(tmp_path, "2_smallest") as server:
        with smtp_is_down(tmp_path):
            server.post(SEND)
            task = until_newest(server, status="queued", attempts=2)
            assert task["error"] == "ConnectionError('the SMTP server does not answer')"
        server.until_sent("ada@example.com")
        assert until_newest(server, status="succeeded")["error"] is None


@pytest.mark.thorough
def test_the_smallest_gives_up_after_eight_attempts(tmp_path: Path) -> None:
    """An attempt that ends with a crash of the process counts, too."""
    with Example(tmp_path, "2_smallest") as server:
        server.post(SEND)
        until_newest(server, status="running")
        server.kill()
        set_attempts(tmp_path, 8)
        server.start()
        assert (newest(server)["status"], newest(server)["error"]) == ("failed", "crashed")

        with smtp_is_down(tmp_path):
            server.post(SEND)
            server.kill()
            with (
                contextlib.closing(sqlite3.connect(tmp_path / "smallest.db")) as database,
                database,
            ):
                database.execute("UPDATE tasks SET attempts = 7 WHERE id = 2")
            server.start()
            until_newest(server, status="failed", attempts=8)


@pytest.mark.thorough
def test_the_smallest_refuses_a_second_process(tmp_path: Path) -> None:
    with Example(tmp_path, "2_smallest") as server:
        server.post(SEND)
        with Process(tmp_path, command=commands("2_smallest")[0]) as second:
            assert second.wait() != 0
        assert "database is locked" in server.log
        until_newest(server, status="succeeded", attempts=1)


# 3_durable_task.py


@pytest.mark.thorough
def test_the_librarys_task_survives_a_kill(tmp_path: Path) -> None:
    with Example(tmp_path, "3_durable_task") as server:
        task = server.post(SEND).json()
        server.wait_for(task["id"], "running")
        server.kill()
        assert not server.sent
        server.start()
        assert server.wait_for(task["id"])["attempts"] == 2
        server.until_sent("ada@example.com")
        assert "task succeeded" in server.log


@pytest.mark.thorough
def test_the_librarys_task_is_tried_again_until_smtp_is_back(tmp_path: Path) -> None:
    with Example(tmp_path, "3_durable_task") as server:
        with smtp_is_down(tmp_path):
            task = server.post(SEND).json()
            waiting = server.wait_for(task["id"], "retrying")
            assert "the SMTP server does not answer" in waiting["error"]
        assert server.wait_for(task["id"])["attempts"] > 1
        server.until_sent("ada@example.com")


@pytest.mark.thorough
def test_a_repeated_request_is_carried_out_once_and_a_stop_lets_tasks_finish(
    tmp_path: Path,
) -> None:
    with Example(tmp_path, "3_durable_task") as server:
        first, second = (server.post(SEND, headers={"Idempotency-Key": "1"}) for _ in range(2))
        assert first.json() == second.json()
        server.wait_for(first.json()["id"], "running")
        server.stop()
        assert server.sent == {"ada@example.com": 1}
        server.start()
        assert server.wait_for(first.json()["id"])["attempts"] == 1
        assert server.get("/tasks/unknown").status_code == httpx2.codes.NOT_FOUND


# 4_your_own_database.py


@pytest.mark.thorough  # it needs SQLAlchemy
def test_orders_invoices_and_their_mails_survive_a_kill(tmp_path: Path, postgres: Postgres) -> None:
    url = postgres.new_database()
    tasks = "SELECT count(*) FROM afterward.tasks"
    with Example(tmp_path, "4_your_own_database", database_url=url) as server:
        refused = server.post("/orders/eve@example.com", params={"in_stock": False})
        assert refused.status_code == httpx2.codes.CONFLICT
        assert postgres.sql("SELECT count(*) FROM orders", url) == postgres.sql(tasks, url) == "0"

        assert server.post("/orders/ada@example.com").is_success
        assert server.post("/invoices/bob@example.com").is_success
        server.kill()
        assert not server.sent
        server.start()
        server.until_sent("ada@example.com")
        server.until_sent("bob@example.com")
        assert postgres.sql("SELECT email FROM orders", url) == "ada@example.com"
        with contextlib.closing(sqlite3.connect(tmp_path / "invoices.db")) as invoices:
            assert invoices.execute("SELECT email FROM invoices").fetchall() == [
                ("bob@example.com",)
            ]
            until(
                lambda: invoices.execute("SELECT * FROM outbox").fetchall() == [], within=PATIENCE
            )
        postgres.sql("INSERT INTO afterward.counts VALUES ('queued', 1000000)", url)
        full = server.post("/orders/carol@example.com")
        assert full.status_code == httpx2.codes.SERVICE_UNAVAILABLE
        assert "Retry-After" in full.headers
        assert postgres.sql("SELECT email FROM orders", url) == "ada@example.com"
        server.stop()
        assert "Traceback" not in server.log


# 5_workers.py


@pytest.mark.thorough
def test_the_tasks_of_a_killed_worker_run_on_another(tmp_path: Path, postgres: Postgres) -> None:
    url = postgres.new_database()
    command = commands("5_workers")[1]
    with (
        Example(tmp_path / "api", "5_workers", database_url=url) as server,
        Process(tmp_path / "first", command=command, database_url=url) as first,
    ):
        recipients = {f"user{number}@example.com" for number in range(4)}
        for recipient in recipients:
            assert server.post(f"/send-notification/{recipient}").is_success
        running = "SELECT count(*) FROM afterward.tasks WHERE status = 'running'"
        until(lambda: postgres.sql(running, url) == "4", within=PATIENCE)
        first.kill()
        with Process(tmp_path / "second", command=command, database_url=url) as second:
            until(lambda: set(_SENT.findall(second.log)) == recipients, within=PATIENCE)
            assert f"by worker {second.pid}" in second.log
            assert second.stop() == 0
        assert not server.sent
