"""P4: how fast a backlog of mails drains, queue included, against the limit.

The limit is a bare loop of aiosmtplib over as many warm connections, with the same mails built
beforehand. Both send to the same kind of sink, which tells how many mails came per second.
"""

import asyncio
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path

import uvloop
from aiosmtplib import SMTP

from app.mail.message import compose, message_id
from app.mail.templates import render
from app.queue.engine import open_engine
from app.queue.queue import Queue
from app.queue.retry import RetryPolicy
from app.queue.task import new_id
from app.tasks import CATALOGUE
from app.tasks.mail import send_email
from benchmarks.harness import Result, Target, compared, in_turn
from benchmarks.load import FOR_MAIL, ROOT, server
from benchmarks.sinks import Sink, sink

CONNECTIONS = int(FOR_MAIL["SMTP_CONNECTIONS"])
BATCH = 1000
SENDER = "notifications@example.com"
MAIL = {"subject": "Hello", "message": "It is done."}


def measure(quick: bool) -> Iterator[Result]:
    """Drain the same tasks over and over, and the loop's mails in turn with them."""
    mails, rounds = (5_000, 3) if quick else (20_000, 5)
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        tasks = waiting(directory, mails)
        taker = stack.enter_context(sink())
        figures = in_turn(
            rounds,
            {
                "ours": lambda: drain(taker, directory, tasks, mails),
                "aiosmtplib alone": lambda: _loop(taker, mails),
            },
        )
    ours, limit = figures["ours"], figures["aiosmtplib alone"]
    yield compared(
        "P4",
        f"{mails:,} waiting mails drained, against aiosmtplib alone",
        ours,
        limit,
        target=Target("≥", 0.70),
        unit="mails/s",
    )


def waiting(directory: Path, mails: int) -> Path:
    """Make a database in which so many mails wait, each to a recipient of its own."""

    async def fill() -> None:
        engine = open_engine(f"sqlite:///{path}")
        await engine.start()
        queue = Queue(engine, CATALOGUE, RetryPolicy())
        for first in range(0, mails, BATCH):
            tasks = queue.collect()
            for number in range(first, min(first + BATCH, mails)):
                tasks.add_task(send_email, to=_recipient(number), **MAIL)
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


def _loop(taker: Sink, mails: int) -> float:
    taker.reset()
    command = [sys.executable, "-m", "benchmarks.p4_drain", str(taker.port), str(mails)]
    subprocess.run(command, cwd=ROOT, check=True)
    return taker.rate(connections=CONNECTIONS)


def _recipient(number: int) -> str:
    return f"user{number}@example.com"


# The loop, in a process of its own


async def send(port: int, mails: int) -> None:
    """Send so many mails, the same as ours, over all connections at once."""
    # In three steps: `sendmail` takes a fifth longer for the same.
    built = iter([(_recipient(number), _built(_recipient(number))) for number in range(mails)])

    async def connection() -> None:
        async with SMTP(hostname="127.0.0.1", port=port) as smtp:
            await smtp.ehlo()
            for recipient, content in built:
                await smtp.mail(SENDER)
                await smtp.rcpt(recipient)
                await smtp.data(content)

    async with asyncio.TaskGroup() as connections:
        for _ in range(CONNECTIONS):
            connections.create_task(connection())


def _built(recipient: str) -> bytes:
    body = render("notification", **MAIL)
    return compose(
        sender=SENDER,
        recipient=recipient,
        subject=MAIL["subject"],
        text=body.text,
        html=body.html,
        message_id=message_id(new_id(time.time()), SENDER),
        date=datetime.now(UTC),
    ).as_bytes()


if __name__ == "__main__":
    uvloop.run(send(*map(int, sys.argv[1:])))
