"""An hour of a small web shop, for the pictures of the dashboard.

`write_hour` writes tasks and caught mails into the files of a service that does not run. They are
as old as the pictures say, because an engine takes the time from its caller. It writes the same
hour each time.
"""

import heapq
import random
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from afterward.engine import Engine
from afterward.engines import open_engine
from afterward.task import Outcome, Status, Task, Writes, new_id, to_json
from app.mail.caught import first_line
from app.mail.message import compose, message_id
from app.mail.templates import render

SENDER = "shop@example.com"
WORKER = "mail-1:4711:9cf6eab7ba20"
MINUTE = 60.0
FOUR_DAYS = 4 * 24 * 3600.0
WAITS = (48.0, 4 * MINUTE, 9 * MINUTE)  # before the second attempt, the third, and further ones

GREYLISTED = "451 4.7.1 Greylisting in action, please come back later"
FULL = "452 4.2.2 The mailbox of this recipient is full"
UNKNOWN = (
    "550 5.1.1 The email account that you tried to reach does not exist. Please try double-checking"
    " the recipient's email address for typos or unnecessary spaces."
)
SPAM = "554 5.7.1 Message rejected: its content looks like spam"


@dataclass(frozen=True)
class Mail:
    """A mail that was accepted some minutes ago, and the SMTP replies that refused or deferred it.

    After a 5xx reply it has failed. After its last 4xx reply the next attempt delivers it, unless
    that attempt lies in the future.
    """

    minutes: float
    recipient: str
    subject: str
    replies: tuple[str, ...] = ()
    message: str = "Thank you for your order. You find all of it in your account."


SHOWN = [
    Mail(52, "grace@example.com", "Your order 2041 is on its way"),
    Mail(47, "hedy@example.org", "Your order 2042 is on its way", (GREYLISTED,)),
    Mail(41, "sales@initech.example", "Invoice 2026-0117", (UNKNOWN,)),
    Mail(38, "katherine@example.org", "Your order 2044 is on its way"),
    Mail(33, "dorothy@example.com", "Reset your password", (GREYLISTED, GREYLISTED)),
    Mail(26, "offers@hooli.example", "Invoice 2026-0119", (SPAM,)),
    Mail(25, "news@hooli.example", "Invoice 2026-0120", (SPAM,)),
    Mail(24, "team@hooli.example", "Invoice 2026-0121", (SPAM,)),
    Mail(19, "margaret@example.com", "Your order 2051 is on its way"),
    Mail(14, "radia@example.net", "Confirm your address"),
    Mail(12, "frances@example.net", "Reset your password", (GREYLISTED, FULL, FULL)),
    Mail(9, "jean.typo@exmaple.example", "Your order 2053 is on its way", (UNKNOWN,)),
    Mail(6, "ada@example.com", "Your order 2054 is on its way", (GREYLISTED, GREYLISTED, FULL)),
    Mail(5, "barbara@example.org", "Confirm your address"),
    Mail(3, "adele@example.com", "Reset your password", (GREYLISTED, GREYLISTED)),
    Mail(2, "annie@example.com", "Your order 2056 is on its way"),
]


async def write_hour(directory: Path, now: float) -> None:
    """Write the tasks into `queue.db`, and the delivered mails of SHOWN into `inbox`."""
    inbox = directory / "inbox"
    inbox.mkdir(parents=True)
    engine = open_engine(f"sqlite:///{directory}/queue.db")
    await engine.start()
    try:
        await _play([*_ordinary_mails(), *SHOWN], engine, inbox, now)
    finally:
        await engine.stop()


def _ordinary_mails() -> Iterator[Mail]:
    """Yield mails that the charts only count: two to nine a minute, all delivered."""
    chance = random.Random(1815)
    for minute in range(1, 59):  # all of them within the hour of the charts
        for number in range(chance.randrange(2, 10)):
            ago = minute + chance.random()
            yield Mail(ago, f"reader-{minute}-{number}@example.com", "The shop's news")


async def _play(mails: list[Mail], engine: Engine, inbox: Path, now: float) -> None:
    """Let a worker of one slot run the mails in the order of their attempts."""
    due = [(now - MINUTE * mail.minutes, number) for number, mail in enumerate(mails)]
    heapq.heapify(due)
    attempts = [0] * len(mails)
    while due and due[0][0] < now:
        at, number = heapq.heappop(due)
        mail, attempt = mails[number], attempts[number]
        if attempt == 0:
            await engine.put(Writes((_task(mail, at),)))
        claim = await engine.claim(WORKER, kinds=["send_email"], limit=1, now=at + 0.01, lease=60)
        outcome = _outcome(mail, attempt, claim.running[0], at)
        ended = await engine.settle(claim.running[0], outcome, at + 0.05 + len(mail.recipient) / 90)
        if outcome.due_at is not None:
            attempts[number] += 1
            heapq.heappush(due, (outcome.due_at, number))
        elif outcome.status is Status.SUCCEEDED and mail in SHOWN and ended is not None:
            _write_caught(inbox, mail, ended)


def _task(mail: Mail, at: float) -> Task:
    kwargs = {"recipient": mail.recipient, "subject": mail.subject, "message": mail.message}
    return Task(
        id=new_id(at),
        kind="send_email",
        arguments=to_json({"args": [], "kwargs": kwargs}),
        created_at=at,
        updated_at=at,
        due_at=at,
        gives_up_at=at + FOUR_DAYS,
        about=mail.recipient,
        request_id=new_id(at - 0.002).replace("-", ""),
    )


def _outcome(mail: Mail, attempt: int, task: Task, at: float) -> Outcome:
    if attempt == len(mail.replies):
        reply = "2.0.0 Ok: queued"
        result = {"message_id": message_id(task.id, SENDER), "reply": reply}
        return Outcome(Status.SUCCEEDED, result=to_json(result))
    reply = mail.replies[attempt]
    permanent = reply.startswith("5")
    kind = "PermanentError" if permanent else "TemporaryError"
    error = to_json({"type": kind, "detail": reply, "smtp_code": int(reply[:3])})
    if permanent:
        return Outcome(Status.FAILED, error=error)
    wait = WAITS[min(attempt, len(WAITS) - 1)]
    return Outcome(Status.RETRYING, due_at=at + wait, error=error)


def _write_caught(inbox: Path, mail: Mail, task: Task) -> None:
    """Write a mail as the catcher does: the name of its file is the time at which it came."""
    body = render("notification", subject=mail.subject, message=mail.message)
    content = compose(
        sender=SENDER,
        recipient=mail.recipient,
        subject=mail.subject,
        text=body.text,
        html=body.html,
        message_id=message_id(task.id, SENDER),
        date=datetime.fromtimestamp(task.created_at, UTC),
    ).as_bytes()
    name = f"{int(1e9 * task.updated_at):019}-{task.id[-8:]}.eml"
    (inbox / name).write_bytes(first_line(SENDER, [mail.recipient], content) + content)
