"""P1c: one request for 1,000 mails, against 1,000 requests.

A single client sends the batches, and waits for each answer. wrk sends the single requests over 64
connections. The worker is paused. The measure runs on SQLite and on PostgreSQL.
"""

import http.client
import itertools
import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from benchmarks.harness import Failed, Result, Target, compared, in_turn
from benchmarks.load import Server, server, wrk, wrk_script
from tests.support.postgres import Postgres, with_tables

ROUNDS, QUICK_ROUNDS = 9, 3
RECIPIENTS = 1000
BATCHES = 10  # requests in a round


def measure(quick: bool) -> Iterator[Result]:
    """Measure both ways on both databases, in turn."""
    rounds = QUICK_ROUNDS if quick else ROUNDS
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        postgres = stack.enter_context(Postgres())
        yield _compare("SQLite", directory, rounds)
        yield _compare("PostgreSQL", directory, rounds, QUEUE_URL=with_tables(postgres))


def _compare(name: str, directory: Path, rounds: int, **settings: str) -> Result:
    script = wrk_script(directory)
    with server(directory, "-m", "app", WORKER_CONCURRENCY="0", **settings) as service:
        numbers = itertools.count()
        wrk(service.port, script), _promise(service, numbers)  # to warm up
        rates = in_turn(
            rounds,
            {
                "batches": lambda: _promise(service, numbers),
                "single requests": lambda: wrk(service.port, script).rate,
            },
        )
    batches, singles = rates.values()
    return compared(
        "P1c",
        f"promising {RECIPIENTS:,} mails in one request, against single requests, on {name}",
        batches,
        singles,
        target=Target("≥", 10),
        unit="mails/s",
    )


def _promise(service: Server, numbers: Iterator[int]) -> float:
    """Send batches, each to new recipients; return the mails per second."""
    connection = http.client.HTTPConnection("127.0.0.1", service.port)
    seconds = 0.0
    for _ in range(BATCHES):
        some = itertools.islice(numbers, RECIPIENTS)
        body = json.dumps(
            {
                "recipients": [f"user{number}@example.com" for number in some],
                "subject": "Hello",
                "message": "It is done.",
            }
        )
        began = time.perf_counter()
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/send-notifications", body, headers)
        answer = connection.getresponse()
        said = answer.read()
        seconds += time.perf_counter() - began
        if answer.status != http.HTTPStatus.ACCEPTED:
            raise Failed(f"a batch was not accepted: {said[:1000]!r}")
    connection.close()
    return BATCHES * RECIPIENTS / seconds
