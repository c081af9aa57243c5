"""The SMTP server is down, or defers every mail, for an hour, while 1,000 mails wait.

No mail fails. After the outage the service delivers the backlog within 20 minutes, over at most
SMTP_CONNECTIONS connections. During the outage it writes a log line or two a minute.

The test sets the clock, so the hour takes seconds. The mails and the connections are real.
"""

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from afterward.queue import Queue
from afterward.registry import Registry, TaskKind
from afterward.retry import RetryPolicy
from afterward.task import Status
from afterward.task_log import TaskLog
from afterward.worker import Worker
from app.mail.recipients import Recipients
from app.mail.smtp import Mailer
from app.tasks.mail import retry_policy, send_email
from app.tasks.tools import Tools
from app.uploads.open_store import open_store
from app.uploads.pictures import Pictures
from tests.library.support import Clock, opened
from tests.support.mails import SENDER
from tests.support.service import PATIENCE, Service, settings_in, until
from tests.support.smtp_server import SmtpServer, in_a_thread
from tests.support.torture import Tried, form

MAILS = form(100, 1000)
CONNECTIONS = 10
WORKER_CONCURRENCY = 40
HOUR = 3600.0
MINUTE = 60.0
STEP = form(10.0, 1.0)  # seconds that the test's clock advances between two polls
DELIVERED_WITHIN = 20 * MINUTE
LINES_A_MINUTE = 2
AWAY = form(3.0, 180.0)  # seconds of the real clock
REAL_MAILS = 40

EIGHT_ATTEMPTS = RetryPolicy(attempts=8, maximum=3600)  # an earlier policy of the service

Trouble = Callable[[SmtpServer], Awaitable[None]]


@dataclass(frozen=True)
class Seen:
    """The results of an hour of trouble."""

    statuses: dict[Status, int]
    delivered: int
    attempts: int
    minutes: float | None  # from the server's return until all mails were delivered
    connections: int  # the most at the same time
    lines: int  # log lines during the trouble

    def __str__(self) -> str:
        """Summarise the results for the table."""
        after = "never" if self.minutes is None else f"after {self.minutes:.1f} min"
        return (
            f"{self.statuses[Status.FAILED]} failed, {self.delivered} delivered, all of them "
            f"{after}, {self.attempts} attempts, {self.connections} connections, "
            f"{self.lines} lines"
        )


async def go_down(server: SmtpServer) -> None:
    await server.stop()


async def come_back(server: SmtpServer) -> None:
    await server.start()


async def greylist(server: SmtpServer) -> None:
    server.always["rcpt"] = "451 4.7.1 Greylisted, please come back later"


async def greylist_no_more(server: SmtpServer) -> None:
    del server.always["rcpt"]


each_trouble = pytest.mark.parametrize(
    ("begin", "end"),
    [(go_down, come_back), (greylist, greylist_no_more)],
    ids=["away", "greylisting"],
)


@pytest.mark.anyio
@each_trouble
async def test_no_mail_fails_and_the_backlog_is_delivered_soon_after(
    tmp_path: Path, begin: Trouble, end: Trouble, tried: Tried
) -> None:
    policy = retry_policy(settings_in(tmp_path, retry_base_seconds=1))
    seen = await an_hour_of(begin, end, tmp_path, policy)
    tried(f"an hour of `{begin.__name__}`, {MAILS} mails", str(seen))
    assert seen.statuses[Status.FAILED] == 0
    assert seen.delivered == MAILS
    assert seen.minutes is not None
    assert seen.minutes * MINUTE <= DELIVERED_WITHIN
    assert seen.connections <= CONNECTIONS
    assert seen.lines <= LINES_A_MINUTE * HOUR / MINUTE
    if begin is go_down:
        # An attempt of each mail after the outage, of each mail that ran when the outage began,
        # and a probe after each pause of up to half a minute.
        assert seen.attempts <= MAILS + WORKER_CONCURRENCY + HOUR / 20


@pytest.mark.anyio
async def test_control_with_eight_attempts_every_mail_fails(tmp_path: Path, tried: Tried) -> None:
    """Eight attempts are used up after a minute or two."""
    seen = await an_hour_of(greylist, greylist_no_more, tmp_path, EIGHT_ATTEMPTS)
    tried(f"an hour of greylisting, {MAILS} mails with 8 attempts each", str(seen))
    assert seen.statuses[Status.FAILED] == MAILS


async def an_hour_of(begin: Trouble, end: Trouble, directory: Path, policy: RetryPolicy) -> Seen:
    """Queue mails, keep the server in trouble for an hour, then end it and measure the delivery."""
    clock = Clock()
    arrived_at = clock.now
    async with opened(directory / "queue.db") as engine, SmtpServer() as server:
        await begin(server)
        mailer = Mailer(host="127.0.0.1", port=server.port, connections=CONNECTIONS)
        queue = Queue(engine, Registry[Tools](TaskKind(send_email, policy)), policy, now=clock)
        tools = _tools(mailer, directory, queue)
        queue.events.subscribe(TaskLog(now=clock).write)
        worker = Worker(queue, tools, concurrency=WORKER_CONCURRENCY)
        collected = queue.collect()
        tasks = [
            collected.add_task(
                send_email, recipient=f"u{n}@example.org", subject="Hello", message="Hi"
            )
            for n in range(MAILS)
        ]
        await queue.commit(collected.collected())
        with capture_logs() as lines:
            await _work(worker, clock, until=arrived_at + HOUR)
        delayed = [line for line in lines if line["log_level"] in {"info", "warning", "error"}]
        await end(server)
        returned_at, minutes = clock.now, None
        while clock.now < returned_at + 2 * DELIVERED_WITHIN and minutes is None:
            with capture_logs():
                await worker.run_until_idle()
            if len(server.received) == MAILS:
                minutes = (clock.now - returned_at) / MINUTE
            clock.now += STEP
        found = [await engine.get(task.id) for task in tasks]
        await mailer.close()
        return Seen(
            statuses={status: sum(task.status is status for task in found) for status in Status},
            delivered=len({mail.recipients for mail in server.received}),
            attempts=sum(task.attempts for task in found),
            minutes=minutes,
            connections=server.open_most,
            lines=len(delayed),
        )


async def _work(worker: Worker[Tools], clock: Clock, *, until: float) -> None:
    while clock.now < until:
        await worker.run_until_idle()
        clock.now += STEP


def _tools(mailer: Mailer, directory: Path, queue: Queue[Tools]) -> Tools:
    store = open_store(f"file:{directory}/uploads")
    return Tools(mailer, SENDER, Recipients(), store, Pictures(), queue.engine, queue)


def test_a_short_real_outage_fails_no_mail(tmp_path: Path, tried: Tried) -> None:
    """This test uses the real clock, and the default settings except for a shorter first pause."""
    server = SmtpServer()
    with (
        in_a_thread(server) as portal,
        Service(tmp_path, catcher=False, smtp_port=server.port, retry_base_seconds=1) as service,
    ):
        portal.call(server.stop)
        began = time.monotonic()
        ids = [
            service.post("/send-notification/ada@example.com").json()["id"]
            for _ in range(REAL_MAILS)
        ]
        until(lambda: time.monotonic() - began > AWAY, within=AWAY + PATIENCE)
        waiting = [service.get(f"/tasks/{task}").json() for task in ids]
        lines = len(service.log.splitlines())
        portal.call(server.start)
        took = until(lambda: len(server.received) == REAL_MAILS, within=60 + PATIENCE)
        attempts = sum(service.wait_for(task)["attempts"] for task in ids)
    tried(
        f"{REAL_MAILS} mails, the server away for {AWAY:g} s",
        f"0 failed, all delivered {took:.1f} s after its return, {attempts} attempts, "
        f"{lines} lines, {server.open_most} connections",
    )
    assert {task["status"] for task in waiting} <= {"queued", "retrying", "running"}
    assert all(task["max_attempts"] is None and task["gives_up_at"] for task in waiting)
    assert server.open_most <= CONNECTIONS
