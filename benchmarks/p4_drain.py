"""P4: the rate at which a backlog of mails drains, against the limit of aiosmtplib.

The limit is a bare loop of aiosmtplib over the same number of open connections, with the same mails
built in advance. It runs in three variants: with messages, which aiosmtplib converts to bytes; with
bytes; and with bytes sent by single commands, which saves a fifth of the time. All send to the same
kind of sink, which measures the mails per second.
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
    """Drain copies of the same tasks, in turn with the three loops."""
    mails, rounds = (5_000, 3) if quick else (20_000, 5)
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        tasks = database_with_mails(directory, mails)
        receiver = stack.enter_context(sink())
        rates = in_turn(
            rounds,
            {"ours": lambda: drain(receiver, directory, tasks, mails)}
            | {way: partial(_run_loop, receiver, mails, way) for way in WAYS},
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


def database_with_mails(directory: Path, mails: int) -> Path:
    """Create a database with `mails` queued mails, each to a different recipient."""

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


def drain(receiver: Sink, directory: Path, tasks: Path, mails: int) -> float:
    """Start the service on a copy of the tasks; return the mails per second."""
    path = Path(shutil.copy(tasks, directory / "queue.db"))
    receiver.reset()
    settings = FOR_MAIL | {"QUEUE_URL": f"sqlite:///{path}", "SMTP_PORT": str(receiver.port)}
    with server(directory, "-m", "app", **settings):
        receiver.wait_for(mails)
    path.unlink()
    return receiver.rate(connections=CONNECTIONS)


def _run_loop(receiver: Sink, mails: int, way: str) -> float:
    receiver.reset()
    command = [sys.executable, "-m", "benchmarks.p4_drain", way, str(receiver.port), str(mails)]
    subprocess.run(command, cwd=ROOT, check=True)
    return receiver.rate(connections=CONNECTIONS)


def _recipient(number: int) -> str:
    return f"user{number}@example.com"


# The bare loop, in a separate process


async def send(way: str, port: int, mails: int) -> None:
    """Send `mails` mails, the same as the service's, over all connections."""
    built = [(_recipient(number), _build_mail(_recipient(number))) for number in range(mails)]
    as_bytes = [(recipient, message.as_bytes()) for recipient, message in built]
    match way:
        case "send_message":
            await _over_all_connections(port, _send_message, built)
        case "sendmail":
            await _over_all_connections(port, _sendmail, as_bytes)
        case _:
            await _over_all_connections(port, _send_commands, as_bytes)


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


async def _send_commands(smtp: SMTP, recipient: str, content: bytes) -> None:
    await smtp.mail(SENDER)
    await smtp.rcpt(recipient)
    await smtp.data(content)


def _build_mail(recipient: str) -> EmailMessage:
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
