"""An SMTP server that takes every mail and keeps none, in a process of its own.

It does as little as it can, so that whoever sends to it is the limit.
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
    """What is asked of the process; each question costs it some microseconds."""

    def __init__(self, process: "subprocess.Popen[bytes]") -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._questions = process.stdin
        self._answers = process.stdout
        self.port = int(self._ask("port"))

    def count(self) -> int:
        """How many mails it has taken."""
        return int(self._ask("count"))

    def arrivals(self) -> dict[str, float]:
        """When the final dot of the first mail to each recipient came, by `time.time()`."""
        arrivals: dict[str, float] = self._ask("arrivals")
        return arrivals

    def round_trips(self) -> float:
        """How often a client waited for replies, for each mail; told by a sink with a latency."""
        return float(self._ask("round_trips"))

    def latency(self) -> float:
        """How late the replies were in truth, in seconds: timers are no more exact than that."""
        return float(self._ask("latency"))

    def reset(self) -> None:
        """Forget what came so far."""
        self._ask("reset")

    def wait_for(self, mails: int) -> None:
        """Return when it has taken so many mails; raises Failed where they do not come."""
        deadline = time.monotonic() + LONGEST_SECONDS
        while (count := self.count()) < mails:
            if time.monotonic() > deadline:
                raise Failed(f"only {count} of {mails} mails have arrived")
            time.sleep(POLL_SECONDS)

    def rate(self, *, connections: int) -> float:
        """Mails per second, each to a recipient of its own, while all the connections were busy.

        So the first mail of each connection is where the time begins, and not counted.
        """
        times = sorted(self.arrivals().values())
        return (len(times) - connections) / (times[-1] - times[connections - 1])

    def _ask(self, question: str) -> Any:
        self._questions.write(question.encode() + b"\n")
        self._questions.flush()
        return json.loads(self._answers.readline())


@contextmanager
def sink(*, latency: float = 0.0, hangs: bool = False) -> Iterator[Sink]:
    """Start one; each of its replies comes `latency` seconds after its command.

    One that hangs accepts connections, and says nothing.
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
    """What came, through all the connections."""

    count: int = 0
    arrivals: dict[str, float] = field(default_factory=dict)
    turns: int = 0  # how often a client had to wait before it could go on
    replies: int = 0
    waited: float = 0.0  # seconds, by all these replies together

    def answer(self, question: str) -> object:
        """What Sink asks."""
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
                self._forget()
                return None

    def _forget(self) -> None:
        self.count = self.turns = self.replies = 0
        self.waited = 0.0
        self.arrivals.clear()


class Session(asyncio.Protocol):
    """One connection. Commands may come several at a time (RFC 2920)."""

    def __init__(self, tally: Tally, latency: float) -> None:
        self._tally = tally
        self._latency = latency
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport
        self._recipients: list[str] = []
        self._rest = b""  # what came and is no whole line, or no whole mail
        self._in_mail = False
        self._owed = 0  # groups of replies that are still to be sent

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Greet."""
        self._transport = cast(asyncio.Transport, transport)
        self._transport.write(b"220 sink ESMTP\r\n")

    def data_received(self, data: bytes) -> None:
        """Take commands and mails, as they come."""
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
        """Give the reply to the next command; nothing if there is none."""
        line, ended, rest = self._rest.partition(b"\r\n")
        if not ended:
            return b""
        verb = line[:4].upper()
        if verb == b"RCPT":
            self._recipients.append(line[line.index(b"<") + 1 : line.index(b">")].decode())
        self._in_mail = verb == b"DATA"
        # The mail may be nothing but its final dot, so the line's end stays before it.
        self._rest = ended + rest if self._in_mail else rest
        return REPLIES.get(verb, OK)

    def _take_mail(self) -> bytes:
        """Give the reply to the final dot; nothing if it has not come."""
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


class Deaf(asyncio.Protocol):
    """A connection on which nothing is said."""


async def serve(latency: float, *, hangs: bool) -> None:
    """Take mails, and answer what is asked on standard input, until that ends."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    loop = asyncio.get_running_loop()
    tally = Tally()
    server = await loop.create_server(
        lambda: Deaf() if hangs else Session(tally, latency), "127.0.0.1", 0, backlog=4096
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
