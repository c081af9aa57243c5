"""P3: the effect of a hanging SMTP server on requests.

The p99 latency of requests while the SMTP server accepts connections and sends no reply, against
the latency while it answers. Two instances of the service run, each with its worker. The requests
come at a rate that both can sustain, including the mails. So this measures the service, and not a
queue of requests in front of it. The p99 with as many requests as wrk can send is given as well.
"""

import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path

from benchmarks.harness import Result, Target, compared, in_turn, percentile
from benchmarks.load import Server, server, wrk, wrk_script
from benchmarks.p1b_sending import wait_for_mails
from benchmarks.pace import send_requests
from benchmarks.sinks import Sink, sink

RATE = 200  # requests per second
SECONDS = 5
ROUNDS, QUICK_ROUNDS = 21, 3


def measure(quick: bool) -> Iterator[Result]:
    """Measure both in turn, first at a fixed rate, then with as many requests as wrk can send."""
    rounds = QUICK_ROUNDS if quick else ROUNDS
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        script = wrk_script(directory)
        receiver, hanging = stack.enter_context(sink()), stack.enter_context(sink(hangs=True))
        answered = stack.enter_context(_service(directory / "answered", receiver))
        hung = stack.enter_context(_service(directory / "hung", hanging))

        def saturated_while_it_answers() -> float:
            return wait_for_mails(receiver, wrk(answered.port, script)).p99 * 1000

        def saturated_while_it_hangs() -> float:
            return wrk(hung.port, script).p99 * 1000

        contestants = {
            "while it hangs": lambda: _paced(hung),
            "while it answers": lambda: _paced(answered),
        }
        in_turn(1, contestants)  # to warm up
        paced = in_turn(rounds, contestants)
        receiver.reset()
        saturated = in_turn(
            rounds,
            {
                "while it hangs": saturated_while_it_hangs,
                "while it answers": saturated_while_it_answers,
            },
        )
    yield _result(f"{RATE} requests/s", Target("≤", 1.2), *paced.values())
    yield _result("all that wrk can send", None, *saturated.values())


def _service(directory: Path, to: Sink) -> AbstractContextManager[Server]:
    directory.mkdir()
    return server(directory, "-m", "app", SMTP_PORT=str(to.port))


def _paced(service: Server) -> float:
    answers = send_requests(service.port, rate=RATE, seconds=SECONDS)
    return percentile([answer.seconds * 1000 for answer in answers], 99)


def _result(load: str, target: Target | None, hangs: list[float], answers: list[float]) -> Result:
    return compared(
        "P3",
        f"p99 of requests while the SMTP server hangs, against while it answers; {load}",
        hangs,
        answers,
        target=target,
        unit="ms",
    )
