"""The SMTP server refuses, defers, drops, hangs or drips its replies, at any stage.

After a 4xx, a drop or silence the mail is tried again. After a 5xx it fails at once, and the code
is kept. Silence of any kind ends the attempt within the timeout of the step, and a second.
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
    HASTY,
    RECIPIENT,
    SENDER,
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
WHOLE_WAY_TIMEOUT = 1.0  # seconds; a busy machine must not take an answer for silence


# The whole way: POST, task, SMTP, status


def test_a_task_is_tried_again_or_fails_as_the_server_says(tmp_path: Path, tried: Tried) -> None:
    """The short form takes every 13th cell of the matrix: each stage, each kind of answer."""
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
            portal.call(server.drop_connections)  # so that it meets every stage
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
    """Whether this is a refusal of the mail; before MAIL, a 5xx is about us or the server."""
    return answer.startswith("5") and stage not in OPENING


def duration(task: Json) -> float:
    """How long an attempt took, in seconds: there may have been two before anybody looked."""
    began, ended = (datetime.fromisoformat(task[name]) for name in ("started_at", "updated_at"))
    return (ended - began).total_seconds() / float(task["attempts"])


def code_of(answer: str) -> int | None:
    """The code of a reply; None for silence."""
    return int(answer[:3]) if answer[0].isdigit() else None


def test_control_plain_background_tasks_lose_what_is_deferred(tmp_path: Path, tried: Tried) -> None:
    """Five mails meet one deferral each, at any stage before the dot, and none arrives."""
    server = SmtpServer()
    for stage in STAGES[:-1]:
        server.once[stage].append("451 4.3.0 Later")
    with (
        in_a_thread(server),
        Service(tmp_path, command=TUTORIAL, smtp_port=server.port) as service,
    ):
        for _ in STAGES:
            # A connection each: it is closed under the client where a task raises.
            answer = httpx2.post(f"{service.url}/send-notification/ada@example.com")
            assert answer.status_code == 202
        service.stop()  # waits for the tasks

    assert not any(server.once.values())
    assert len(server.received) == 1
    tried("6 mails, 5 deferrals, plain BackgroundTasks", "5 lost")


# Every cell of the matrix, as the mailer sees it


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
async def test_a_refusal_is_permanent_once_there_is_a_mail_to_refuse(
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
    async def meet(stage: str) -> None:
        async with SmtpServer() as server:
            server.always[stage] = silence
            await deferred_in_time(mailer_to(server, **HASTY))

    await asyncio.gather(*map(meet, STAGES))


@pytest.mark.anyio
@pytest.mark.parametrize("answer", ["nonsense", "152 2.0.0 Perhaps", "652 2.0.0 Perhaps"])
@pytest.mark.parametrize("stage", STAGES)
async def test_an_answer_that_makes_no_sense_is_temporary(
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
    await deferred_in_time(mailer)
    await server.start()
    assert await send(mailer)


@pytest.mark.anyio
async def test_a_server_that_does_not_even_accept_is_temporary(
    full: SmtpServer, mailer_to: MakeMailer
) -> None:
    await deferred_in_time(mailer_to(full, **HASTY))


@pytest.mark.anyio
@pytest.mark.parametrize("security", ["starttls", "tls"])
async def test_a_server_that_never_begins_tls_is_temporary(
    server: SmtpServer, mailer_to: MakeMailer, security: Security
) -> None:
    if security == "starttls":
        server.always["ehlo"] = "250-test\r\n250 STARTTLS"
    else:
        server.always["connect"] = HANG
    await deferred_in_time(mailer_to(server, security=security, **HASTY))


@pytest.mark.anyio
async def test_a_hang_at_data_does_not_take_as_long_as_one_at_the_dot_may(
    server: SmtpServer, mailer_to: MakeMailer
) -> None:
    server.always["data"] = HANG
    await deferred_in_time(mailer_to(server, **HASTY | {"data_timeout": 60}))


@pytest.mark.anyio
async def test_control_a_timeout_of_each_read_does_not_end_what_drips(
    server: SmtpServer, tried: Tried
) -> None:
    """The standard library's: with a byte now and then, an attempt may take for ever."""
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


async def deferred_in_time(mailer: Mailer) -> None:
    """Send a mail: it is deferred without a code within the timeout and a second."""
    began = time.monotonic()
    error = await failure(send(mailer))
    assert time.monotonic() - began < TIMEOUT + form(10, 1)
    assert isinstance(error, MailDeferred)
    assert error.smtp_code is None
    assert mailer.open_connections == 0


@pytest.fixture
def full() -> Iterator[SmtpServer]:
    """A server that is too busy to accept: it neither takes nor refuses connections."""
    server = SmtpServer()
    with ExitStack() as sockets:
        listener = sockets.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        server.port = listener.getsockname()[1]
        for _ in range(4):  # more than it lets wait
            waiting = sockets.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(("127.0.0.1", server.port))
        with pytest.raises(TimeoutError):
            socket.create_connection(("127.0.0.1", server.port), timeout=0.1)
        yield server
