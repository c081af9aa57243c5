"""P7: how long after its 202 a mail arrives, at 100 requests a second.

From the moment in which the client has the 202 to the mail's final dot at the sink, by one clock;
against a bare loop that sends mails built beforehand over a warm connection of aiosmtplib at the
same pace, from its call to the final dot.
"""

import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path

import uvloop
from aiosmtplib import SMTP

from app.mail.message import compose
from app.mail.templates import render
from benchmarks.harness import Result, Series, Spread, Target, in_turn, percentile
from benchmarks.load import server
from benchmarks.pace import at_pace, send_requests
from benchmarks.sinks import Sink, sink

RATE = 100  # a second
SECONDS, QUICK_SECONDS = 20, 5
ROUNDS, QUICK_ROUNDS = 5, 2
PERCENTILES = tuple(range(1, 100))
SENDER = "notifications@example.com"


def measure(quick: bool) -> Iterator[Result | Series]:
    """Measure both, in turn."""
    seconds = QUICK_SECONDS if quick else SECONDS
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        taker = stack.enter_context(sink())
        service = stack.enter_context(server(directory, "-m", "app", SMTP_PORT=str(taker.port)))
        contestants = {
            "after the 202": lambda: _after_the_202(taker, service.port, seconds),
            "a bare loop": lambda: _bare_loop(taker, seconds),
        }
        in_turn(1, contestants)  # to warm up
        delays = in_turn(QUICK_ROUNDS if quick else ROUNDS, contestants)
    ours, bare = delays.values()
    for percent, most in ((50, 5), (99, 25)):
        a = [percentile(one, percent) for one in ours]
        b = [percentile(one, percent) for one in bare]
        yield Result(
            "P7",
            f"from the 202 to the mail's arrival, more than a bare loop takes: p{percent}",
            Spread.of([x - y for x, y in zip(a, b, strict=True)]),
            unit="ms",
            target=Target("≤", most),
            ours=Spread.of(a),
            theirs=Spread.of(b),
            figures_unit="ms",
        )
    for name, rounds in delays.items():
        every = [delay for one in rounds for delay in one]
        yield Series(
            "How long until a mail has arrived",
            name,
            PERCENTILES,
            tuple(percentile(every, percent) for percent in PERCENTILES),
            "percent of the mails",
            "milliseconds at most",
        )


def _after_the_202(taker: Sink, port: int, seconds: int) -> list[float]:
    """Milliseconds from each answer to the arrival of its mail."""
    taker.reset()
    answers = send_requests(port, rate=RATE, seconds=seconds)
    taker.wait_for(len(answers))
    arrivals = taker.arrivals()
    return [(arrivals[answer.recipient] - answer.at) * 1000 for answer in answers]


def _bare_loop(taker: Sink, seconds: int) -> list[float]:
    """Milliseconds from each call to the arrival of its mail."""
    taker.reset()
    called: dict[str, float] = {}
    content = _mail()

    async def loop() -> None:
        async with SMTP(hostname="127.0.0.1", port=taker.port) as connection:

            async def send(number: int) -> None:
                recipient = f"user{number}@example.com"
                called[recipient] = time.time()
                await connection.sendmail(SENDER, [recipient], content)

            await at_pace(send, rate=RATE, seconds=seconds)

    uvloop.run(loop())
    taker.wait_for(len(called))
    arrivals = taker.arrivals()
    return [(arrivals[recipient] - at) * 1000 for recipient, at in called.items()]


def _mail() -> bytes:
    """The mail that ours sends."""
    subject, message = "Hello", "It is done."
    body = render("notification", subject=subject, message=message)
    return compose(
        sender=SENDER,
        recipient="user@example.com",
        subject=subject,
        text=body.text,
        html=body.html,
        message_id=f"<{'0' * 36}@example.com>",
        date=datetime.now(UTC),
    ).as_bytes()
