"""The SMTP server refuses, defers, drops, hangs or drips its replies, at every stage.

After a 4xx, a dropped connection or silence, the mail is tried again. After a 5xx about the mail it
fails at once, and the task keeps the code. Silence of any kind ends the attempt within the step's
timeout plus a second.
"""

import asyncio
import smtplib
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import datetime
from itertools import product
from pathlib import Path

import httpx2
import pytest

from app.mail.replies import MailDeferred, MailRefused, ServerUnavailable
from app.mail.smtp import Mailer, Security
from tests.support.mails import (
    RECIPIENT,
    SENDER,
    SHORT_TIMEOUTS,
    STAGES,
    TIMEOUT,
    MakeMailer,
    a_mail,
    failure,
    send,
)
from tests.support.service import Json, Service
from tests.support.smtp_server import DRIP, DROP, HANG, TRICKLE, SmtpServer, in_a_thread
from tests.support.torture import Tried, form

TUTORIAL = (sys.executable, "-m", "tests.support.tutorial")
DEFERRALS = [421, 450, 451, 452]
REFUSALS = [550, 552, 554]
OPENING = ["connect", "ehlo"]
SILENCES = [HANG, DROP, DRIP, TRICKLE]
WHOLE_WAY_TIMEOUT = 1.0  # seconds; long enough for a reply on a busy machine


# From the POST through task and SMTP to the status


def test_a_task_is_retried_after_a_deferral_and_fails_after_a_refusal(
    tmp_path: Path, tried: Tried
) -> None:
    """The short form tries every 13th pair of a stage and a reply. This covers each stage."""
    replies = [*(f"{code} Later" for code in DEFERRALS), *(f"{code} No" for code in REFUSALS)]
    cells = list(product(STAGES, [*replies, *SILENCES]))[:: form(13, 1)]
    server = SmtpServer()
    seconds = []
    with (
        in_a_thread(server) as portal,
        Service(
            tmp_path,
            catcher=False,
            smtp_port=server.port,
            smtp_timeout=WHOLE_WAY_TIMEOUT,
            smtp_data_timeout=WHOLE_WAY_TIMEOUT,
        ) as service,
    ):
        for stage, answer in cells:
            portal.call(
                server.drop_connections
            )  # so that a new connection goes through every stage
            server.always = {stage: answer}
            task = service.post("/send-notification/ada@example.com").json()
            refused = is_refusal(stage, answer)
            ended = service.wait_for(task["id"], "failed" if refused else "retrying")
            seconds.append(duration(ended))
            assert ended["error"].get("smtp_code") == code_of(answer), (stage, answer, ended)
            server.always = {}
            if refused:
                assert ended["attempts"] == 1
            else:
                assert service.wait_for(task["id"])["attempts"] > 1

    assert max(seconds) < WHOLE_WAY_TIMEOUT + form(10, 1)
    refusals = sum(is_refusal(*cell) for cell in cells)
    tried(
        f"{len(cells)} cells from POST to status",
        f"{refusals} failed at once, {len(cells) - refusals} tried again and delivered; "
        f"the longest attempt took {max(seconds):.2f} s with a timeout of {WHOLE_WAY_TIMEOUT} s",
    )


def is_refusal(stage: str, answer: str) -> bool:
    """Return whether a reply refuses the mail. Before MAIL, a 5xx is about the client or server."""
    return answer.startswith("5") and stage not in OPENING


def duration(task: Json) -> float:
    """Return the seconds of an attempt: the average, because the test may see the task late."""
    began, ended = (datetime.fromisoformat(task[name]) for name in ("started_at", "updated_at"))
    return (ended - began).total_seconds() / float(task["attempts"])


def code_of(answer: str) -> int | None:
    """Return the code of a reply, or None for silence."""
    return int(answer[:3]) if answer[0].isdigit() else None


def test_control_plain_background_tasks_lose_deferred_mail(tmp_path: Path, tried: Tried) -> None:
    """Five mails get a deferral each, at each stage before the dot, and are lost."""
    server = SmtpServer()
    for stage in STAGES[:-1]:
        server.once[stage].append("451 4.3.0 Later")
    with (
        in_a_thread(server),
        Service(tmp_path, command=TUTORIAL, smtp_port=server.port) as service,
    ):
        for _ in STAGES:
            # A new connection for each request, because the server closes it when a task raises.
            answer = httpx2.post(f"{service.url}/send-notification/ada@example.com")
            assert answer.status_code == 202
        service.stop()  # waits for its background tasks

    assert not any(server.once.values())
    assert len(server.received) == 1
    tried("6 mails, 5 deferrals, plain BackgroundTasks", "5 lost")


# Every pair of a stage and a reply, with the mailer alone


@pytest.mark.anyio
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("code", DEFERRALS)
async def test_a_deferral_at_any_stage_is_temporary(
    server: SmtpServer, mailer_to: MakeMailer, stage: str, code: int
) -> None:
    server.always[stage] = f"{code} 4.0.0 Later"
    error = await failure(send(mailer_to(server)))
    assert isinstance(error, MailDeferred)
    assert (error.smtp_code, error.detail) == (code, f"{code} 4.0.0 Later")


@pytest.mark.anyio
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("code", REFUSALS)
async def test_a_refusal_is_permanent_from_mail_on_and_temporary_before(
    server: SmtpServer, mailer_to: MakeMailer, stage: str, code: int
) -> None:
    server.always[stage] = f"{code} 5.0.0 Never"
    error = await failure(send(mailer_to(server)))
    assert isinstance(error, ServerUnavailable if stage in OPENING else MailRefused)
    assert (error.smtp_code, error.detail) == (code, f"{code} 5.0.0 Never")


@pytest.mark.anyio
@pytest.mark.parametrize("silence", SILENCES)
async def test_silence_at_any_stage_is_temporary_and_ends_in_time(
    mailer_to: MakeMailer, silence: str
) -> None:
    async def meet_silence_at(stage: str) -> None:
        async with SmtpServer() as server:
            server.always[stage] = silence
            await assert_deferred_in_time(mailer_to(server, **SHORT_TIMEOUTS))

    await asyncio.gather(*map(meet_silence_at, STAGES))


@pytest.mark.anyio
@pytest.mark.parametrize("answer", ["nonsense", "152 2.0.0 Perhaps", "652 2.0.0 Perhaps"])
@pytest.mark.parametrize("stage", STAGES)
async def test_an_invalid_reply_is_temporary(
    server: SmtpServer, mailer_to: MakeMailer, stage: str, answer: str
) -> None:
    server.always[stage] = answer
    assert isinstance(await failure(send(mailer_to(server))), MailDeferred)


@pytest.mark.anyio
async def test_a_server_that_is_down_is_temporary(
    server: SmtpServer, mailer_to: MakeMailer
) -> None:
    mailer = mailer_to(server)
    await server.stop()
    await assert_deferred_in_time(mailer)
    await server.start()
    assert await send(mailer)


@pytest.mark.anyio
async def test_a_server_that_does_not_accept_connections_is_temporary(
    full: SmtpServer, mailer_to: MakeMailer
) -> None:
    await assert_deferred_in_time(mailer_to(full, **SHORT_TIMEOUTS))


@pytest.mark.anyio
@pytest.mark.parametrize("security", ["starttls", "tls"])
async def test_a_server_that_never_begins_tls_is_temporary(
    server: SmtpServer, mailer_to: MakeMailer, security: Security
) -> None:
    if security == "starttls":
        server.always["ehlo"] = "250-test\r\n250 STARTTLS"
    else:
        server.always["connect"] = HANG
    await assert_deferred_in_time(mailer_to(server, security=security, **SHORT_TIMEOUTS))


@pytest.mark.anyio
async def test_a_hang_at_data_ends_after_the_timeout_of_a_step_and_not_of_the_dot(
    server: SmtpServer, mailer_to: MakeMailer
) -> None:
    server.always["data"] = HANG
    await assert_deferred_in_time(mailer_to(server, **SHORT_TIMEOUTS | {"data_timeout": 60}))


@pytest.mark.anyio
async def test_control_a_timeout_for_each_read_does_not_end_a_dripping_reply(
    server: SmtpServer, tried: Tried
) -> None:
    """The standard library's smtplib has such a timeout, which each byte of a reply restarts."""
    server.always["mail"] = DRIP

    def send_with_smtplib() -> None:
        with smtplib.SMTP("127.0.0.1", server.port, timeout=TIMEOUT) as client:
            client.send_message(a_mail(), SENDER, RECIPIENT)

    began = time.monotonic()
    sending = asyncio.create_task(asyncio.to_thread(send_with_smtplib))
    ended, _ = await asyncio.wait([sending], timeout=TIMEOUT + 1)
    tried(
        f"smtplib with a timeout of {TIMEOUT} s",
        f"still waits after {time.monotonic() - began:.1f} s",
    )
    await server.drop_connections()
    with pytest.raises((OSError, smtplib.SMTPException)):
        await sending
    assert not ended


async def assert_deferred_in_time(mailer: Mailer) -> None:
    """Assert that a mail is deferred without a code, within the timeout plus a second."""
    began = time.monotonic()
    error = await failure(send(mailer))
    assert time.monotonic() - began < TIMEOUT + form(10, 1)
    assert isinstance(error, MailDeferred)
    assert error.smtp_code is None
    assert mailer.open_connections == 0


@pytest.fixture
def full() -> Iterator[SmtpServer]:
    """A server with a full accept queue: it neither accepts nor refuses connections."""
    server = SmtpServer()
    with ExitStack() as sockets:
        listener = sockets.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        server.port = listener.getsockname()[1]
        for _ in range(4):  # more than the accept queue holds
            waiting = sockets.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(("127.0.0.1", server.port))
        with pytest.raises(TimeoutError):
            socket.create_connection(("127.0.0.1", server.port), timeout=0.1)
        yield server
