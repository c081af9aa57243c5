"""P7: the delay from a 202 to the arrival of its mail, at 100 requests a second.

The delay runs from the client's receipt of the 202 to the mail's final dot at the sink, by the same
clock. It is compared with a bare loop that sends a prepared mail over an open connection of
aiosmtplib at the same rate, from its call to the final dot.
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

RATE = 100  # requests per second
SECONDS, QUICK_SECONDS = 20, 5
ROUNDS, QUICK_ROUNDS = 5, 2
PERCENTILES = tuple(range(1, 100))
SENDER = "notifications@example.com"


def measure(quick: bool) -> Iterator[Result | Series]:
    """Measure the service and the bare loop, in turn."""
    seconds = QUICK_SECONDS if quick else SECONDS
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        receiver = stack.enter_context(sink())
        service = stack.enter_context(server(directory, "-m", "app", SMTP_PORT=str(receiver.port)))
        contestants = {
            "after the 202": lambda: _after_the_202(receiver, service.port, seconds),
            "a bare loop": lambda: _bare_loop(receiver, seconds),
        }
        in_turn(1, contestants)  # to warm up
        delays = in_turn(QUICK_ROUNDS if quick else ROUNDS, contestants)
    ours, bare = delays.values()
    for percent, most in ((50, 5), (99, 25)):
        a = [percentile(delays_of_round, percent) for delays_of_round in ours]
        b = [percentile(delays_of_round, percent) for delays_of_round in bare]
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
        every = [delay for delays_of_round in rounds for delay in delays_of_round]
        yield Series(
            "How long until a mail has arrived",
            name,
            PERCENTILES,
            tuple(percentile(every, percent) for percent in PERCENTILES),
            "percent of the mails",
            "milliseconds at most",
        )


def _after_the_202(receiver: Sink, port: int, seconds: int) -> list[float]:
    """Return the milliseconds from each answer to the arrival of its mail."""
    receiver.reset()
    answers = send_requests(port, rate=RATE, seconds=seconds)
    receiver.wait_for(len(answers))
    arrivals = receiver.arrivals()
    return [(arrivals[answer.recipient] - answer.at) * 1000 for answer in answers]


def _bare_loop(receiver: Sink, seconds: int) -> list[float]:
    """Return the milliseconds from each call to the arrival of its mail."""
    receiver.reset()
    called: dict[str, float] = {}
    content = _mail()

    async def loop() -> None:
        async with SMTP(hostname="127.0.0.1", port=receiver.port) as connection:

            async def send(number: int) -> None:
                recipient = f"user{number}@example.com"
                called[recipient] = time.time()
                await connection.sendmail(SENDER, [recipient], content)

            await at_pace(send, rate=RATE, seconds=seconds)

    uvloop.run(loop())
    receiver.wait_for(len(called))
    arrivals = receiver.arrivals()
    return [(arrivals[recipient] - at) * 1000 for recipient, at in called.items()]


def _mail() -> bytes:
    """Compose the same mail as the service."""
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
