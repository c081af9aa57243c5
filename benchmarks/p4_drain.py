"""P4: how fast a backlog of mails drains, queue included, against the limit.

The limit is a bare loop of aiosmtplib over as many warm connections, with the same mails built
beforehand: as messages, which it turns into bytes; as bytes; and as bytes sent by its single
commands, which saves a fifth. All send to the same kind of sink, which tells how many mails came a
second.
"""

import asyncio
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack
from datetime import UTC, datetime
from email.message import EmailMessage
from functools import partial
from pathlib import Path
from typing import TypeVar

import uvloop
from aiosmtplib import SMTP

from afterward.engines import open_engine
from afterward.queue import Queue
from afterward.retry import RetryPolicy
from afterward.task import new_id
from app.mail.message import compose, message_id
from app.mail.templates import render
from app.settings import Settings
from app.tasks import registry
from app.tasks.mail import send_email
from benchmarks.harness import Result, Target, compared, in_turn
from benchmarks.load import FOR_MAIL, ROOT, server
from benchmarks.sinks import Sink, sink

CONNECTIONS = int(FOR_MAIL["SMTP_CONNECTIONS"])
BATCH = 1000
SENDER = "notifications@example.com"
WAYS = {
    "send_message": "messages, by send_message",
    "sendmail": "their bytes, by sendmail",
    "commands": "their bytes, by single commands",
}
MAIL = {"subject": "Hello", "message": "It is done."}


MailT = TypeVar("MailT")


def measure(quick: bool) -> Iterator[Result]:
    """Drain the same tasks over and over, and the loop's mails in turn with them."""
    mails, rounds = (5_000, 3) if quick else (20_000, 5)
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        tasks = waiting(directory, mails)
        taker = stack.enter_context(sink())
        rates = in_turn(
            rounds,
            {"ours": lambda: drain(taker, directory, tasks, mails)}
            | {way: partial(_loop, taker, mails, way) for way in WAYS},
        )
    for way, how in WAYS.items():
        yield compared(
            "P4",
            f"{mails:,} waiting mails drained, against aiosmtplib alone: {how}",
            rates["ours"],
            rates[way],
            target=Target("≥", 0.70),
            unit="mails/s",
        )


def waiting(directory: Path, mails: int) -> Path:
    """Make a database in which so many mails wait, each to a recipient of its own."""

    async def fill() -> None:
        engine = open_engine(f"sqlite:///{path}")
        await engine.start()
        queue = Queue(engine, registry(Settings(_env_file=None)), RetryPolicy())
        for first in range(0, mails, BATCH):
            tasks = queue.collect()
            for number in range(first, min(first + BATCH, mails)):
                tasks.add_task(send_email, recipient=_recipient(number), **MAIL)
            await queue.commit(tasks.collected())
        await engine.stop()

    path = directory / "waiting.db"
    asyncio.run(fill())
    return path


def drain(taker: Sink, directory: Path, tasks: Path, mails: int) -> float:
    """Start the service on a copy of the tasks; mails per second."""
    path = Path(shutil.copy(tasks, directory / "queue.db"))
    taker.reset()
    settings = FOR_MAIL | {"QUEUE_URL": f"sqlite:///{path}", "SMTP_PORT": str(taker.port)}
    with server(directory, "-m", "app", **settings):
        taker.wait_for(mails)
    path.unlink()
    return taker.rate(connections=CONNECTIONS)


def _loop(taker: Sink, mails: int, way: str) -> float:
    taker.reset()
    command = [sys.executable, "-m", "benchmarks.p4_drain", way, str(taker.port), str(mails)]
    subprocess.run(command, cwd=ROOT, check=True)
    return taker.rate(connections=CONNECTIONS)


def _recipient(number: int) -> str:
    return f"user{number}@example.com"


# The loop, in a process of its own


async def send(way: str, port: int, mails: int) -> None:
    """Send so many mails, the same as ours, over all connections at once."""
    built = [(_recipient(number), _built(_recipient(number))) for number in range(mails)]
    as_bytes = [(recipient, message.as_bytes()) for recipient, message in built]
    match way:
        case "send_message":
            await _over_all_connections(port, _send_message, built)
        case "sendmail":
            await _over_all_connections(port, _sendmail, as_bytes)
        case _:
            await _over_all_connections(port, _command, as_bytes)


async def _over_all_connections(
    port: int,
    send_one: Callable[[SMTP, str, MailT], Awaitable[object]],
    built: list[tuple[str, MailT]],
) -> None:
    rest = iter(built)

    async def connection() -> None:
        async with SMTP(hostname="127.0.0.1", port=port) as smtp:
            await smtp.ehlo()
            for recipient, mail in rest:
                await send_one(smtp, recipient, mail)

    async with asyncio.TaskGroup() as connections:
        for _ in range(CONNECTIONS):
            connections.create_task(connection())


async def _send_message(smtp: SMTP, recipient: str, message: EmailMessage) -> None:
    await smtp.send_message(message, sender=SENDER, recipients=[recipient])


async def _sendmail(smtp: SMTP, recipient: str, content: bytes) -> None:
    await smtp.sendmail(SENDER, [recipient], content)


async def _command(smtp: SMTP, recipient: str, content: bytes) -> None:
    await smtp.mail(SENDER)
    await smtp.rcpt(recipient)
    await smtp.data(content)


def _built(recipient: str) -> EmailMessage:
    body = render("notification", **MAIL)
    return compose(
        sender=SENDER,
        recipient=recipient,
        subject=MAIL["subject"],
        text=body.text,
        html=body.html,
        message_id=message_id(new_id(time.time()), SENDER),
        date=datetime.now(UTC),
    )


if __name__ == "__main__":
    way, port, mails = sys.argv[1:]
    uvloop.run(send(way, int(port), int(mails)))
