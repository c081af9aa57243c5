"""An SMTP server in a separate process that accepts every mail and stores none.

It does as little as possible, so that the sender is the limit.
"""

import asyncio
import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import uvloop

from benchmarks.harness import Failed
from benchmarks.load import ROOT

POLL_SECONDS = 0.02
LONGEST_SECONDS = 300.0

EHLO = b"250-sink\r\n250-PIPELINING\r\n250-8BITMIME\r\n250 SMTPUTF8\r\n"
GO_AHEAD = b"354 Go ahead\r\n"
OK = b"250 2.0.0 Ok\r\n"
BYE = b"221 2.0.0 Bye\r\n"
REPLIES = {b"EHLO": EHLO, b"DATA": GO_AHEAD, b"QUIT": BYE}  # to anything else: OK


class Sink:
    """Queries the process. Each query costs it some microseconds."""

    def __init__(self, process: "subprocess.Popen[bytes]") -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._questions = process.stdin
        self._answers = process.stdout
        self.port = int(self._ask("port"))

    def count(self) -> int:
        """Return the number of accepted mails."""
        return int(self._ask("count"))

    def arrivals(self) -> dict[str, float]:
        """Return the `time.time()` of the first mail's final dot, for each recipient."""
        arrivals: dict[str, float] = self._ask("arrivals")
        return arrivals

    def round_trips(self) -> float:
        """Return the round trips for each mail. Only a sink with a latency counts them."""
        return float(self._ask("round_trips"))

    def latency(self) -> float:
        """Return the true mean latency in seconds, because timers are not exact."""
        return float(self._ask("latency"))

    def reset(self) -> None:
        """Set all counts to zero."""
        self._ask("reset")

    def wait_for(self, mails: int) -> None:
        """Wait until `mails` mails have arrived. Raise Failed after a timeout."""
        deadline = time.monotonic() + LONGEST_SECONDS
        while (count := self.count()) < mails:
            if time.monotonic() > deadline:
                raise Failed(f"only {count} of {mails} mails have arrived")
            time.sleep(POLL_SECONDS)

    def rate(self, *, connections: int) -> float:
        """Return the mails per second while all connections were busy.

        So the time begins with the first mail of the last connection, and the first mail of each
        connection does not count. Each mail must have a different recipient.
        """
        times = sorted(self.arrivals().values())
        return (len(times) - connections) / (times[-1] - times[connections - 1])

    def _ask(self, question: str) -> Any:
        self._questions.write(question.encode() + b"\n")
        self._questions.flush()
        return json.loads(self._answers.readline())


@contextmanager
def sink(*, latency: float = 0.0, hangs: bool = False) -> Iterator[Sink]:
    """Start a sink with replies that come `latency` seconds after their command.

    With `hangs`, it accepts connections, and sends nothing.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.sinks", str(latency), *["hangs"] * hangs],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with process:
        try:
            yield Sink(process)
        finally:
            process.terminate()


# The process


@dataclass(slots=True)
class Tally:
    """The counts of all connections."""

    count: int = 0
    arrivals: dict[str, float] = field(default_factory=dict)
    turns: int = 0  # the number of times that a client had to wait for replies
    replies: int = 0
    waited: float = 0.0  # the sum of all replies' delays in seconds

    def answer(self, question: str) -> object:
        """Return the answer to a query of Sink."""
        match question:
            case "count":
                return self.count
            case "arrivals":
                return self.arrivals
            case "round_trips":
                return self.turns / self.count
            case "latency":
                return self.waited / self.replies
            case _:
                self._reset()
                return None

    def _reset(self) -> None:
        self.count = self.turns = self.replies = 0
        self.waited = 0.0
        self.arrivals.clear()


class Session(asyncio.Protocol):
    """A connection. The client may send several commands at a time (RFC 2920)."""

    def __init__(self, tally: Tally, latency: float) -> None:
        self._tally = tally
        self._latency = latency
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport
        self._recipients: list[str] = []
        self._rest = b""  # an incomplete line or mail
        self._in_mail = False
        self._owed = 0  # groups of replies that are not sent yet

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send the greeting."""
        self._transport = cast(asyncio.Transport, transport)
        self._transport.write(b"220 sink ESMTP\r\n")

    def data_received(self, data: bytes) -> None:
        """Process all complete commands and mails."""
        self._rest += data
        replies = b""
        while reply := self._take_mail() if self._in_mail else self._take_command():
            replies += reply
        if not replies:
            return
        if self._latency:
            self._tally.turns += not self._owed and replies not in {EHLO, BYE}
            self._owed += 1
            self._loop.call_later(self._latency, self._reply, replies, time.perf_counter())
        else:
            self._transport.write(replies)

    def _reply(self, replies: bytes, asked_at: float) -> None:
        self._owed -= 1
        self._tally.replies += 1
        self._tally.waited += time.perf_counter() - asked_at
        self._transport.write(replies)

    def _take_command(self) -> bytes:
        """Return the reply to the next command, or b"" if it is incomplete."""
        line, ended, rest = self._rest.partition(b"\r\n")
        if not ended:
            return b""
        verb = line[:4].upper()
        if verb == b"RCPT":
            self._recipients.append(line[line.index(b"<") + 1 : line.index(b">")].decode())
        self._in_mail = verb == b"DATA"
        # Keep the CRLF of DATA, because an empty mail is only CRLF, dot, CRLF.
        self._rest = ended + rest if self._in_mail else rest
        return REPLIES.get(verb, OK)

    def _take_mail(self) -> bytes:
        """Return the reply to the final dot, or b"" if it has not arrived."""
        _, ended, rest = self._rest.partition(b"\r\n.\r\n")
        if not ended:
            return b""
        now = time.time()
        self._tally.count += 1
        for recipient in self._recipients:
            self._tally.arrivals.setdefault(recipient, now)
        self._recipients.clear()
        self._in_mail, self._rest = False, rest
        return OK


class SilentSession(asyncio.Protocol):
    """A connection on which the server sends nothing."""


async def serve(latency: float, *, hangs: bool) -> None:
    """Accept mails, and answer the queries on standard input until it closes."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    loop = asyncio.get_running_loop()
    tally = Tally()
    server = await loop.create_server(
        lambda: SilentSession() if hangs else Session(tally, latency), "127.0.0.1", 0, backlog=4096
    )
    port = server.sockets[0].getsockname()[1]
    ended = asyncio.Event()

    def answer() -> None:
        if question := sys.stdin.readline().strip():
            print(json.dumps(port if question == "port" else tally.answer(question)), flush=True)
        else:
            ended.set()

    loop.add_reader(sys.stdin, answer)
    await ended.wait()


if __name__ == "__main__":
    uvloop.run(serve(float(sys.argv[1]), hangs="hangs" in sys.argv))
