"""The connection drops between the final dot and the 250, so the mail may have been accepted.

The service sends the mail again, byte for byte the same. Its Message-ID shows that the copies are
the same mail. There are never more copies than attempts.
"""

import random
from collections import Counter, defaultdict
from email.utils import make_msgid
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from app.main import create_app
from tests.support.service import Json, settings_in, wait_for
from tests.support.smtp_server import DROP, Received, SmtpServer
from tests.support.torture import Tried, form

USUAL = "250 2.0.0 Ok"


def test_copies_share_their_message_id_and_are_no_more_than_the_attempts(
    tmp_path: Path, smtp_server: SmtpServer, tried: Tried
) -> None:
    """The reply to the final dot is lost for about half of the mails."""
    mails = form(20, 1000)
    smtp_server.once["dot"].extend(random.choices([DROP, USUAL], k=mails))
    tasks = deliver(tmp_path, smtp_server, mails)

    assert copies_share_their_message_id(tasks, smtp_server.received)
    copies, attempts = len(smtp_server.received), sum(task["attempts"] for task in tasks)
    tried(
        f"{mails} mails, {copies - mails} connections dropped after the dot",
        f"{copies} copies in {attempts} attempts, {mails} Message-IDs",
    )


def test_control_with_a_new_message_id_for_each_attempt_copies_look_like_different_mails(
    tmp_path: Path, smtp_server: SmtpServer, monkeypatch: pytest.MonkeyPatch, tried: Tried
) -> None:
    """Many senders call the standard library's make_msgid for each attempt."""
    monkeypatch.setattr("app.tasks.mail.message_id", lambda *_: make_msgid())
    smtp_server.once["dot"].extend([DROP] * 3)
    tasks = deliver(tmp_path, smtp_server, 3)

    assert not copies_share_their_message_id(tasks, smtp_server.received)
    tried("3 mails, 3 drops, make_msgid", f"{len(ids_of(smtp_server.received))} Message-IDs")


def deliver(directory: Path, server: SmtpServer, mails: int) -> list[Json]:
    """Queue `mails` mails, wait for all of them, and return their tasks."""
    settings = settings_in(directory, catcher=False, smtp_port=server.port)
    with TestClient(create_app(settings)) as client:
        queued = [client.post("/send-notification/ada@example.com").json() for _ in range(mails)]
        return [wait_for(client, task["id"]) for task in queued]


def copies_share_their_message_id(tasks: list[Json], received: list[Received]) -> bool:
    """Return whether each mail arrived, at most once per attempt, and its copies are identical."""
    copies = ids_of(received)
    contents = defaultdict(set)
    for mail in received:
        contents[message_id(mail)].add(mail.content)
    return (
        set(copies) == {f"<{task['id']}@example.com>" for task in tasks}
        and all(copies[f"<{task['id']}@example.com>"] <= task["attempts"] for task in tasks)
        and all(len(different) == 1 for different in contents.values())
    )


def ids_of(received: list[Received]) -> Counter[str]:
    """Return how often each Message-ID arrived."""
    return Counter(map(message_id, received))


def message_id(mail: Received) -> str:
    return mail.content.partition(b"Message-ID: ")[2].partition(b"\r\n")[0].decode()
