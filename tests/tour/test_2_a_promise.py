"""Second stop: a promise. The task is on disk before the 202, so a crash does not lose it."""

import sqlite3
from pathlib import Path

from tests.support.service import Service


def test_a_task_that_was_answered_202_is_on_disk(tmp_path: Path) -> None:
    """The process is killed right after the 202. The next process runs the task."""
    with Service(tmp_path, worker_concurrency=0) as service:
        answer = service.post("/send-notification/ada@example.com", json={"subject": "Hello"})
        service.kill()

    assert answer.status_code == 202
    task = answer.json()
    assert task["status"] == "queued"
    assert answer.headers["Location"] == f"/tasks/{task['id']}"
    assert rows(tmp_path) == [(task["id"], "send_email", "queued", 0)]

    with Service(tmp_path) as service:
        done = service.wait_for(task["id"], "succeeded")
        assert done["attempts"] == 1
        [mail] = service.mails
        assert mail.subject == "Hello"
        assert mail.message_id == f"<{task['id']}@example.com>"


def test_a_route_may_have_both_a_promise_and_courtesies(tmp_path: Path) -> None:
    """The route writes two log lines as courtesies, and sends a mail as a promise."""
    with Service(tmp_path) as service:
        answer = service.post("/send-notification/ada@example.com", params={"q": "why not"})
        service.wait_for(answer.json()["id"], "succeeded")

        log = (tmp_path / "log.txt").read_text()
        assert log == "found query: why not\nmessage to ada@example.com\n"
        assert len(service.mails) == 1


def rows(directory: Path) -> list[tuple[str, str, str, int]]:
    """Return the tasks in the service's database."""
    connection = sqlite3.connect(directory / "queue.db")
    try:
        return connection.execute("SELECT id, kind, status, attempts FROM tasks").fetchall()
    finally:
        connection.close()
