"""The connection drops after the final dot, before the 250: the mail may have been taken, or not.

It is sent again, the same to the byte, so its Message-ID tells that the copies are one mail; and
there are never more copies than attempts.
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


def test_copies_are_one_mail_and_no_more_than_the_attempts(
    tmp_path: Path, smtp_server: SmtpServer, tried: Tried
) -> None:
    """Half of the first dots, one for each mail, lose their answer."""
    mails = form(20, 1000)
    smtp_server.once["dot"].extend(random.choices([DROP, USUAL], k=mails))
    tasks = deliver(tmp_path, smtp_server, mails)

    assert copies_are_told_by_their_message_id(tasks, smtp_server.received)
    copies, attempts = len(smtp_server.received), sum(task["attempts"] for task in tasks)
    tried(
        f"{mails} mails, {copies - mails} connections dropped after the dot",
        f"{copies} copies in {attempts} attempts, {mails} Message-IDs",
    )


def test_control_a_new_message_id_for_each_attempt_makes_copies_mails_of_their_own(
    tmp_path: Path, smtp_server: SmtpServer, monkeypatch: pytest.MonkeyPatch, tried: Tried
) -> None:
    """As the standard library's make_msgid gives it, and many a sender uses it."""
    monkeypatch.setattr("app.tasks.mail.message_id", lambda *_: make_msgid())
    smtp_server.once["dot"].extend([DROP] * 3)
    tasks = deliver(tmp_path, smtp_server, 3)

    assert not copies_are_told_by_their_message_id(tasks, smtp_server.received)
    tried("3 mails, 3 drops, make_msgid", f"{len(ids_of(smtp_server.received))} Message-IDs")


def deliver(directory: Path, server: SmtpServer, mails: int) -> list[Json]:
    """Queue so many mails and wait for all; returns their tasks."""
    settings = settings_in(directory, catcher=False, smtp_port=server.port)
    with TestClient(create_app(settings)) as client:
        queued = [client.post("/send-notification/ada@example.com").json() for _ in range(mails)]
        return [wait_for(client, task["id"]) for task in queued]


def copies_are_told_by_their_message_id(tasks: list[Json], received: list[Received]) -> bool:
    """Whether each mail came, no more often than it was tried, and nothing else."""
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
    """How often each Message-ID came."""
    return Counter(map(message_id, received))


def message_id(mail: Received) -> str:
    """The mail's Message-ID."""
    return mail.content.partition(b"Message-ID: ")[2].partition(b"\r\n")[0].decode()
