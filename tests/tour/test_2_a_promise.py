"""Second stop: a promise. It is on disk before the 202, and kept after it."""

import sqlite3
from pathlib import Path

from tests.support.service import Service


def test_what_was_answered_202_is_on_disk(tmp_path: Path) -> None:
    """A process that is killed at that moment leaves the task behind, and the next one does it."""
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


def test_a_promise_and_a_courtesy_stand_side_by_side(tmp_path: Path) -> None:
    """One route: a line in the log as a courtesy, twice, and a mail as a promise."""
    with Service(tmp_path) as service:
        answer = service.post("/send-notification/ada@example.com", params={"q": "why not"})
        service.wait_for(answer.json()["id"], "succeeded")

        log = (tmp_path / "log.txt").read_text()
        assert log == "found query: why not\nmessage to ada@example.com\n"
        assert len(service.mails) == 1


def rows(directory: Path) -> list[tuple[str, str, str, int]]:
    """The tasks in the database of the service in this directory."""
    connection = sqlite3.connect(directory / "queue.db")
    try:
        return connection.execute("SELECT id, kind, status, attempts FROM tasks").fetchall()
    finally:
        connection.close()
