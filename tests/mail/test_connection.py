"""An SMTP connection: the commands of each round trip, and the parsing of replies.

The server here follows a script: for each round trip, its bytes in the pieces in which they go out.
So a test knows exactly what the client received before each command.
"""

import asyncio
import ssl
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import pytest
from aiosmtplib import SMTPResponse

from app.mail import connection, smtp
from app.mail.replies import MailDeferred, MailRefused
from tests.support.mails import RECIPIENT, SENDER, SHORT_TIMEOUTS, MakeMailer, a_mail, failure, send
from tests.support.smtp_server import DROP, SmtpServer

pytestmark = pytest.mark.anyio

MAIL, RCPT, DATA = f"MAIL FROM:<{SENDER}>\r\n", f"RCPT TO:<{RECIPIENT}>\r\n", "DATA\r\n"
ENVELOPE = MAIL + RCPT + DATA
CONTENT = smtp._as_smtp_data(a_mail().as_bytes()).decode()
RSET, QUIT = "RSET\r\n", "QUIT\r\n"
GREETING, OK, GO, BYE = b"220 test\r\n", b"250 2.0.0 Ok\r\n", b"354 Go ahead\r\n", b"221 Bye\r\n"
PLAIN, PIPELINING = b"250-test\r\n250 8BITMIME\r\n", b"250-test\r\n250 PIPELINING\r\n"
LATER, NEVER, TOO_EARLY = b"451 4.0.0 Later\r\n", b"550 5.0.0 Never\r\n", b"503 5.5.1 Not yet\r\n"
CLOSING = b"421 4.7.0 Enough\r\n"
WELCOME = [GREETING, PIPELINING]
SENT = [OK + OK + GO, OK]

Turn = bytes | Sequence[bytes]


class Scripted:
    """Sends the first turn of its script to a new client, and a further turn after each read.

    After the last turn it closes the connection. The next connection begins the next script.
    """

    def __init__(self, *scripts: Sequence[Turn]) -> None:
        self.port = 0
        self.heard: list[list[str]] = []  # for each connection, the bytes between the turns
        self._scripts = iter(scripts)
        self._sessions: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:  # noqa: D105
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *exception: object) -> None:  # noqa: D105
        self._server.close()
        async with asyncio.timeout(5):
            await asyncio.gather(*self._sessions)  # each ends with its script

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        session = asyncio.current_task()
        assert session is not None
        self._sessions.append(session)
        heard: list[str] = []
        self.heard.append(heard)
        try:
            for number, turn in enumerate(next(self._scripts)):
                if number:
                    heard.append(await self._hear(reader))
                for piece in [turn] if isinstance(turn, bytes) else turn:
                    writer.write(piece)
                    await writer.drain()
                    await asyncio.sleep(0.001)
        finally:
            writer.transport.abort()

    async def _hear(self, reader: asyncio.StreamReader) -> str:
        try:
            return (await reader.read(1 << 16)).decode()
        except ConnectionError:
            return ""


# -- round trips


async def test_with_pipelining_a_mail_takes_two_round_trips(mailer_to: MakeMailer) -> None:
    async with Scripted([*WELCOME, *SENT, *SENT, BYE]) as server:
        mailer = mailer_to(server)
        assert await send(mailer) == "250 2.0.0 Ok"
        await send(mailer)
        await mailer.close()
    assert server.heard[0][1:] == [ENVELOPE, CONTENT, ENVELOPE, CONTENT, QUIT]


async def test_without_pipelining_a_mail_takes_four_round_trips(mailer_to: MakeMailer) -> None:
    async with Scripted([GREETING, PLAIN, OK, OK, GO, OK, BYE]) as server:
        mailer = mailer_to(server)
        await send(mailer)
        await mailer.close()
    assert server.heard[0][1:] == [MAIL, RCPT, DATA, CONTENT, QUIT]


ANSWER = b"250-2.1.0 Ok\r\n250 so far\r\n251 2.1.5 Elsewhere\r\n354-Go\r\n354 ahead\r\n"
SPLIT = {
    "in one piece": [ANSWER],
    "line by line": ANSWER.splitlines(keepends=True),
    "byte by byte": [bytes([byte]) for byte in ANSWER],
    "cut across": [ANSWER[:16], ANSWER[16:50], ANSWER[50:]],
    "with bare line ends": [ANSWER.replace(b"\r", b"")],
}


@pytest.mark.parametrize("pieces", SPLIT.values(), ids=SPLIT)
async def test_replies_are_separated_however_their_bytes_are_split(
    mailer_to: MakeMailer, pieces: list[bytes]
) -> None:
    async with Scripted([*WELCOME, pieces, [b"250-2.0.0 Ok\r\n", b"250 queued\r\n"]]) as server:
        assert await send(mailer_to(server)) == "250 2.0.0 Ok queued"
    assert server.heard[0][1:] == [ENVELOPE, CONTENT]


@pytest.mark.parametrize("offered", ["before", "after"])
async def test_pipelining_is_used_only_if_it_is_offered_after_starttls(
    mailer_to: MakeMailer,
    certificate: Path,
    server_tls: ssl.SSLContext,
    monkeypatch: pytest.MonkeyPatch,
    offered: str,
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    async with SmtpServer(starttls=server_tls) as server:
        server.once["ehlo"].extend(
            f"250-test\r\n250-STARTTLS\r\n250 {'PIPELINING' if offered == when else 'SIZE'}"
            for when in ("before", "after")
        )
        server.always["mail"] = "550 5.0.0 Never"
        await failure(send(mailer_to(server, security="starttls", timeout=5)))
    verbs = [line.split()[0] for line in server.commands]
    in_one_go = ["RCPT", "DATA"] if offered == "after" else []
    assert verbs == ["EHLO", "STARTTLS", "EHLO", "MAIL", *in_one_go, "RSET"]


# -- refusals


REFUSALS: dict[str, tuple[list[bytes], str]] = {
    "MAIL": ([NEVER, TOO_EARLY, TOO_EARLY], "550 5.0.0 Never"),
    "MAIL, and RCPT for another reason": ([LATER, NEVER, TOO_EARLY], "451 4.0.0 Later"),
    "RCPT": ([OK, NEVER, TOO_EARLY], "550 5.0.0 Never"),
    "RCPT, and DATA in other words": ([OK, LATER, b"554 no recipients\r\n"], "451 4.0.0 Later"),
    "DATA": ([OK, OK, LATER], "451 4.0.0 Later"),
}


@pytest.mark.parametrize(("replies", "told"), REFUSALS.values(), ids=REFUSALS)
@pytest.mark.parametrize("at_once", [True, False])
async def test_the_first_refusal_is_reported_and_the_connection_is_reused(
    mailer_to: MakeMailer, replies: list[bytes], told: str, at_once: bool
) -> None:
    turn = b"".join(replies) if at_once else replies
    async with Scripted([*WELCOME, turn, OK, *SENT, BYE]) as server:
        mailer = mailer_to(server)
        assert (await failure(send(mailer))).detail == told
        await send(mailer)
        await mailer.close()
    assert server.heard[0][1:] == [ENVELOPE, RSET, ENVELOPE, CONTENT, QUIT]


@pytest.mark.parametrize("answer", [OK, b"554 5.5.1 No valid recipients\r\n"])
@pytest.mark.parametrize("envelope", [OK + NEVER + GO, NEVER + TOO_EARLY + GO])
async def test_if_data_is_accepted_without_a_recipient_the_client_sends_an_empty_mail(
    mailer_to: MakeMailer, envelope: bytes, answer: bytes
) -> None:
    """RFC 2920, section 3.1: the client must then send a single dot, and no content."""
    async with Scripted([*WELCOME, envelope, answer, OK, *SENT, BYE]) as server:
        mailer = mailer_to(server)
        error = await failure(send(mailer))
        await send(mailer)
        await mailer.close()
    assert isinstance(error, MailRefused)
    assert error.detail == "550 5.0.0 Never"
    assert server.heard[0][1:] == [ENVELOPE, ".\r\n", RSET, ENVELOPE, CONTENT, QUIT]


LOST, SILENT = "Connection lost", "The SMTP server did not answer in time"
LEFT_IN_THE_MIDST: dict[str, tuple[bytes, str]] = {
    "421 for MAIL": (CLOSING, "421 4.7.0 Enough"),
    "421 for RCPT": (OK + CLOSING, "421 4.7.0 Enough"),
    "421 for DATA": (OK + OK + CLOSING, "421 4.7.0 Enough"),
    "a refusal, then 421": (NEVER + CLOSING, "550 5.0.0 Never"),
    "a refusal, then nothing": (OK + NEVER, "550 5.0.0 Never"),
    "a refusal, then nonsense": (NEVER + b"Moo\r\n", "550 5.0.0 Never"),
    "a refusal, and half a reply": (NEVER + b"503-5.5.1 Not\r\n503", "550 5.0.0 Never"),
    "nothing after MAIL": (OK, LOST),
    "nothing after RCPT": (OK + OK, LOST),
    "half a reply": (OK + OK + b"35", LOST),
    "nonsense": (OK + b"Moo\r\n" + GO, "The SMTP server's answer made no sense"),
}


@pytest.mark.parametrize("stays", [False, True])
@pytest.mark.parametrize(("replies", "told"), LEFT_IN_THE_MIDST.values(), ids=LEFT_IN_THE_MIDST)
async def test_a_server_that_stops_replying_is_disconnected_and_its_last_reply_is_reported(
    mailer_to: MakeMailer,
    monkeypatch: pytest.MonkeyPatch,
    replies: bytes,
    told: str,
    stays: bool,
) -> None:
    """The server closes the connection, or keeps it open in silence until the timeout."""
    monkeypatch.setattr(connection, "GOODBYE_SECONDS", 0.1)
    async with Scripted([*WELCOME, replies, *[b""] * stays], [*WELCOME, *SENT]) as server:
        mailer = mailer_to(server, **SHORT_TIMEOUTS if stays else {})
        error = await failure(send(mailer))
        assert error.detail == (SILENT if stays and told == LOST else told)
        assert mailer.open_connections == 0
        await send(mailer)
    assert [heard[1:] for heard in server.heard] == [
        [ENVELOPE, *[""] * stays],
        [ENVELOPE, CONTENT],
    ]


# -- stale connections


@pytest.mark.parametrize("answer", [DROP, "421 4.7.0 Too many mails on this connection"])
async def test_several_stale_connections_at_the_same_time_fail_no_mail(
    server: SmtpServer, mailer_to: MakeMailer, answer: str
) -> None:
    server.delay["dot"] = 0.02  # so that the mails use different connections
    mailer = mailer_to(server, connections=3, timeout=5, data_timeout=5)
    await asyncio.gather(*(send(mailer) for _ in range(3)))
    server.once["mail"].extend([answer] * 3)
    await asyncio.gather(*(send(mailer) for _ in range(3)))
    assert (server.open_total, server.open_most, len(server.received)) == (6, 3, 6)


@pytest.mark.parametrize("said", [b"", CLOSING, CLOSING + TOO_EARLY + TOO_EARLY, OK, OK + OK])
async def test_a_reused_connection_is_replaced_only_if_the_server_did_not_reply_to_the_mail(
    mailer_to: MakeMailer, said: bytes
) -> None:
    async with Scripted([*WELCOME, *SENT, said], [*WELCOME, *SENT]) as server:
        mailer = mailer_to(server)
        await send(mailer)
        if said.startswith(OK):
            assert (await failure(send(mailer))).detail == LOST
        await send(mailer)
    assert [heard[1:] for heard in server.heard] == [
        [ENVELOPE, CONTENT, ENVELOPE],
        [ENVELOPE, CONTENT],
    ]


async def test_a_reused_connection_that_is_silent_is_not_replaced_within_the_attempt(
    mailer_to: MakeMailer,
) -> None:
    async with Scripted([*WELCOME, *SENT, b"", b""]) as server:
        mailer = mailer_to(server, **SHORT_TIMEOUTS)
        await send(mailer)
        error = await failure(send(mailer))
    assert error.detail == SILENT
    assert len(server.heard) == 1


# -- replies before their command


async def test_a_reply_that_came_before_its_command_does_not_count(mailer_to: MakeMailer) -> None:
    """A 250 that arrives together with the 354 is not a reply to the content."""
    async with Scripted([*WELCOME, OK + OK + GO + OK, b""]) as server:
        mailer = mailer_to(server)
        error = await failure(send(mailer))
        assert mailer.open_connections == 0
    assert isinstance(error, MailDeferred)
    assert error.detail == "The server spoke out of turn"
    assert server.heard[0][1:] == [ENVELOPE, ""]


@pytest.mark.parametrize("unasked", [CLOSING, OK, b"x" * 1_000_000])
async def test_a_reused_connection_with_an_unsolicited_reply_is_replaced(
    mailer_to: MakeMailer, unasked: bytes
) -> None:
    """The client buffers only a limited part of an unsolicited reply."""
    script: list[Turn] = [*WELCOME, SENT[0], [OK, unasked], b""]
    async with Scripted(script, [*WELCOME, *SENT]) as server:
        mailer = mailer_to(server)
        await send(mailer)
        await asyncio.sleep(0.05)
        (opened,) = mailer._open
        assert 0 < len(opened._channel._unread) < 500_000
        await send(mailer)
    assert [heard[1:] for heard in server.heard] == [
        [ENVELOPE, CONTENT, ""],
        [ENVELOPE, CONTENT],
    ]


async def test_a_connection_lost_before_its_first_mail_is_temporary(
    mailer_to: MakeMailer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server closes the connection after its reply to EHLO, before the client sends MAIL."""
    ehlo = connection.Connection.ehlo

    async def ehlo_and_lose(opened: connection.Connection) -> SMTPResponse:
        reply = await ehlo(opened)
        opened.close()
        return reply

    monkeypatch.setattr(connection.Connection, "ehlo", ehlo_and_lose)
    async with Scripted(WELCOME) as server:
        mailer = mailer_to(server)
        error = await failure(send(mailer))
        assert mailer.open_connections == 0
    assert isinstance(error, MailDeferred)
    assert error.detail == LOST


# -- closing of idle connections


async def test_a_connection_that_is_needed_again_is_not_closed_as_idle(
    server: SmtpServer, mailer_to: MakeMailer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(smtp, "IDLE_SECONDS", 0.0)
    mailer = mailer_to(server, connections=1)
    await asyncio.gather(*(send(mailer) for _ in range(3)))
    assert server.open_total == 1
