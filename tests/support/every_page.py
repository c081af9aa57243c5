"""A service with everything that the pages can show: long names, many rows, every status."""

import json
import smtplib
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from email.message import EmailMessage
from email.policy import SMTP
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from afterward.history import MOST_KEPT
from afterward.task import FINISHED, Status
from tests.support.pages import HOSTILE
from tests.support.pictures import picture
from tests.support.service import PATIENCE, Service, free_port, until

KEY = "the-key"
CLIENT = "a-client-with-a-rather-long-name"
# Each of these would widen a page that does not break long words.
LONG_WORD = "x" * 180
LONG_ADDRESS = f"{'ada' * 20}@{'mail' * 15}.{'host' * 15}.example.com"
LONG_WORKER = f"mail-1.{'host' * 15}.example.com:4711:5f2a"
LONG_TEXT = "The server has a lot to say about this mail. " * 20 + LONG_WORD
RECIPIENTS = 60  # more than a page of tasks has, and a page of mails
MAIL_VIEWS = ("html", "text", "headers", "attachments")
HOUR = 3_600.0


@dataclass(frozen=True)
class Address:
    """The address of a page. Some pages answer to a form with these fields, sent by POST."""

    path: str
    fields: dict[str, str] | None = None


PAGES = {
    "overview": Address("/"),
    "tasks": Address("/board/tasks"),
    "tasks, bad search": Address("/board/tasks?since=yesterday&period=1h&about=%00"),
    "failures": Address("/board/failures"),
    "batches": Address("/board/batches"),
    "uploads": Address("/board/uploads"),
    "workers": Address("/board/workers"),
    "send": Address("/board/send"),
    "send, bad fields": Address("/board/send", {"recipient": "nobody", "subject": "x" * 300}),
    "inbox": Address("/inbox"),
    "inbox, bad search": Address("/inbox?q=" + "x" * 300),
    "404": Address("/board/nowhere"),
    "404, task": Address("/board/tasks/01890000-0000-7000-8000-000000000000"),
    "422": Address("/board/uploads?after=%00"),
}
"""The pages that a service without data has, by their names."""


@dataclass(frozen=True)
class FullService:
    """The service, and ids: of a task in each status, an upload, and a mail with attachments."""

    service: Service
    tasks: dict[Status, str]
    upload: str
    mail: str

    @property
    def pages(self) -> dict[str, Address]:
        """All pages, by their names."""
        condition = {"kind": "send_email", "error": "PermanentError 550"}
        long_condition = {"about": LONG_ADDRESS, "request_id": LONG_WORD}
        paths = {
            **{f"task, {status}": f"/board/tasks/{task}" for status, task in self.tasks.items()},
            "tasks, search": f"/board/tasks?{urlencode(condition)}",
            "tasks, nothing found": f"/board/tasks?{urlencode(long_condition)}",
            "retry these": f"/board/tasks/retry?{urlencode(condition)}",
            "cancel none": f"/board/tasks/cancel?{urlencode(long_condition)}",
            "upload": f"/board/uploads/{self.upload}",
            "inbox, search": "/inbox?q=invoice",
            **{f"mail, {view}": f"/inbox/{self.mail}?view={view}" for view in MAIL_VIEWS},
            "sign in": "/board/sign-in",
        }
        mail = {"recipient": "ada@example.com", "subject": "Hello", "message": "Hello"}
        too_late = f"/board/tasks/{self.tasks[Status.SUCCEEDED]}/cancel"
        return {
            **PAGES,
            **{name: Address(path) for name, path in paths.items()},
            "409, too late": Address(too_late, {}),
            "503": Address("/board/send", mail),
            "sign in, wrong key": Address("/board/sign-in", {"key": "wrong"}),
        }


@contextmanager
def full_service(directory: Path) -> Iterator[FullService]:
    """Yield a service with an API key, `KEY`, and with data on every page. Its backlog is full.

    It has no worker, so its tasks keep their statuses.
    """
    port = free_port()
    with _with_key(directory, smtp_port=port) as service:
        tasks = dict(zip(Status, _send_mails(service), strict=True))
        upload = _upload_files(service)
        service.post(f"/save-data/?user_id={'u' * 60}", json={"text": "A long text. " * 900})
        mail = _catch_a_mail(service, port)
        until(lambda: _all_finished(service), within=PATIENCE)
    _rewrite(directory / "queue.db", tasks)
    with _with_key(directory, worker_concurrency=0, max_backlog=1) as service:
        yield FullService(service, tasks, upload, mail)


@contextmanager
def _with_key(directory: Path, **settings: Any) -> Iterator[Service]:
    with Service(directory, api_keys=f"{CLIENT}: {KEY}", **settings) as service:
        service.client.headers["X-API-Key"] = KEY
        yield service


def _send_mails(service: Service) -> list[str]:
    """Send batches, and for each status a mail. Return the ids of the latter's tasks."""
    for recipient in (f"refuse+{code}@example.com" for code in (550, 552, 553)):
        recipients = [recipient] * 3 + [f"ada{n}@example.com" for n in range(RECIPIENTS // 3)]
        service.post("/send-notifications", json={"recipients": recipients}).raise_for_status()
    mail = {"subject": LONG_WORD, "message": LONG_TEXT * 5}
    recipients = ["refuse+550@example.com" if s is Status.FAILED else LONG_ADDRESS for s in Status]
    answers = [service.post(f"/send-notification/{r}", json=mail) for r in recipients]
    return [answer.raise_for_status().json()["id"] for answer in answers]


def _upload_files(service: Service) -> str:
    """Upload files with odd names. Return the id of the one with the longest word."""
    files = {
        f"{LONG_WORD}.txt": b"Hello",
        f"{HOSTILE}.txt": b"Hello",
        "A quarterly report with a name of many words (final, second version).pdf": b"%PDF-1.7",
        "picture.png": picture(),
    }
    answers = [
        service.post("/upload", files={"file": (name, content)}).raise_for_status().json()
        for name, content in files.items()
    ]
    return str(answers[0]["upload"]["id"])


def _catch_a_mail(service: Service, port: int) -> str:
    """Send a mail with long header fields and attachments to the catcher. Return its id."""
    mail = EmailMessage(policy=SMTP)
    mail["Subject"] = f"Invoice {LONG_WORD} {HOSTILE}"
    mail["X-Long"] = LONG_TEXT
    mail.set_content(LONG_TEXT)
    mail.add_alternative(f"<h1>Invoice</h1><p>{LONG_TEXT * 9}</p>", subtype="html")
    for name in ("a.html", f"{LONG_WORD}.html"):
        mail.add_attachment(b"Hello", "text", "html", filename=name)
    with smtplib.SMTP("127.0.0.1", port) as smtp:
        smtp.sendmail(LONG_ADDRESS, [f"{n}{LONG_ADDRESS}" for n in range(12)], mail.as_bytes())
    found = service.get("/inbox?q=invoice", headers={"Accept": "application/json"}).json()
    return str(found["data"][0]["id"])


def _all_finished(service: Service) -> bool:
    unfinished = ",".join(status for status in Status if status not in FINISHED)
    return not service.get(f"/tasks?status={unfinished}").json()["data"]


def _rewrite(database: Path, tasks: dict[Status, str]) -> None:
    """Give tasks their statuses and long histories, behind the back of a service that does not run.

    There are also a worker with a heartbeat, a silent one, and an upload that is not checked yet.
    """
    now = time.time()
    error = json.dumps({"type": "PermanentError", "detail": LONG_TEXT, "smtp_code": 550})
    never_run: dict[str, object] = {"attempts": 0, "claims": 0, "owner": None, "started_at": None}
    unfinished: dict[str, object] = {"finished_at": None, "result": None}
    tried: dict[str, object] = {"attempts": 25, "claims": 27, "history": _history(now, error)}
    changes = {
        Status.QUEUED: unfinished | never_run | {"due_at": now - HOUR},
        Status.RUNNING: unfinished | tried | {"lease_expires_at": now + HOUR, "progress": 0.4},
        Status.RETRYING: unfinished | tried | {"due_at": now + HOUR, "error": error},
        Status.FAILED: tried | {"error": error},
        Status.CANCELLED: {"result": None} | never_run,
    }
    with closing(sqlite3.connect(database)) as connection, connection:
        for status, columns in changes.items():
            names = ", ".join(f"{name} = :{name}" for name in columns)
            task = {"id": tasks[status], "status": status, "created_at": now - HOUR}
            connection.execute(
                f"UPDATE tasks SET status = :status, created_at = :created_at, {names} "
                "WHERE id = :id",
                columns | task,
            )
        connection.execute(
            "INSERT INTO records SELECT collection, client, ?, json_set(body, '$.seen_at', ?), "
            "created_at FROM records WHERE collection = 'workers'",
            (LONG_WORKER, now - HOUR),
        )
        connection.execute(
            "UPDATE records SET body = json_set(body, '$.seen_at', ?) "
            "WHERE collection = 'workers' AND id <> ?",
            (now + HOUR, LONG_WORKER),
        )
        connection.execute(
            "UPDATE records SET body = json_set(body, '$.status', 'received') WHERE id = "
            "(SELECT min(id) FROM records WHERE collection = 'uploads')"
        )


def _history(now: float, error: str) -> str:
    """Return as many failed attempts as a task keeps. One has crashed, and two had a retry."""
    attempts = [
        {
            "attempt": number,
            "started_at": now - 600 + 10 * index,
            "seconds": None if index == 3 else 1.5,
            "worker": LONG_WORKER,
            "error": None if index == 3 else json.loads(error),
        }
        for index, number in enumerate([*range(6, 18), *range(1, MOST_KEPT - 11)])
    ]
    return json.dumps(attempts)
