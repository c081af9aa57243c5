"""The mailer with a scripted SMTP server. More failures of servers are in tests/faults."""

import asyncio
import contextlib
import errno
import socket
import ssl
from collections.abc import AsyncIterator
from email.message import EmailMessage
from pathlib import Path

import pytest

from app.mail import connection, smtp
from app.mail.replies import MailDeferred, MailRefused, ServerUnavailable
from tests.support.mails import RECIPIENT, SENDER, STAGES, MakeMailer, a_mail, failure, send
from tests.support.smtp_server import DEAF, DROP, HANG, SmtpServer

pytestmark = pytest.mark.anyio

# -- the bytes on the wire


async def test_a_mail_arrives_as_it_was_built(server: SmtpServer, mailer_to: MakeMailer) -> None:
    assert await send(mailer_to(server)) == "250 2.0.0 Ok"
    (received,) = server.received
    assert (received.sender, received.recipients) == (SENDER, (RECIPIENT,))
    assert received.content == a_mail().as_bytes().replace(b"\r\n.", b"\r\n..")


async def test_bare_line_ends_in_a_message_are_sent_as_crlf(
    server: SmtpServer, mailer_to: MakeMailer
) -> None:
    message = EmailMessage()
    message.set_payload("a\r.\rb\n.\nc")
    await mailer_to(server).send(message, sender=SENDER, recipient=RECIPIENT)
    assert server.received[0].content == b"\r\na\r\n..\r\nb\r\n..\r\nc\r\n"


async def test_a_recipient_that_is_not_an_address_is_refused(
    server: SmtpServer, mailer_to: MakeMailer
) -> None:
    for recipient in (
        "ada lovelace@example.org",
        "a@example.org> <b@example.org",
        "ädä@example.org",
    ):
        sending = mailer_to(server).send(a_mail(), sender=SENDER, recipient=recipient)
        assert isinstance(await failure(sending), MailRefused)
    assert not any(line.startswith("RCPT") for line in server.commands)


async def test_an_unexpected_error_is_not_reported_as_a_mail_error(
    server: SmtpServer, mailer_to: MakeMailer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error keeps its type, so that the worker logs its traceback."""
    mailer = mailer_to(server)
    await send(mailer)

    async def fail(*_: object) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr(connection.Connection, "send", fail)
    with pytest.raises(KeyError):
        await send(mailer)
    assert mailer.open_connections == 0


# -- opening a connection


@pytest.mark.parametrize("stage", ["connect", "ehlo", "auth"])
@pytest.mark.parametrize("answer", ["421 4.3.2 Down", "550 5.7.1 Blocked", "554 5.3.2 No mail"])
async def test_a_refusal_before_the_first_mail_is_an_outage(
    server: SmtpServer, mailer_to: MakeMailer, stage: str, answer: str
) -> None:
    """Every other mail would fail in the same way, and may succeed later. The code is kept."""
    server.always[stage] = answer
    mailer = mailer_to(server, **LOGIN)
    error = await failure(send(mailer))
    assert isinstance(error, ServerUnavailable)
    assert error.smtp_code == int(answer[:3])
    assert not await mailer.check()
    assert mailer.open_connections == 0


async def test_a_server_that_is_down_is_an_outage_and_the_error_names_its_address(
    server: SmtpServer, mailer_to: MakeMailer
) -> None:
    await server.stop()
    error = await failure(send(mailer_to(server)))
    assert isinstance(error, ServerUnavailable)
    assert error.detail.startswith(f"No connection to the SMTP server 127.0.0.1:{server.port}: ")
    await server.start()


@pytest.mark.parametrize(
    "limit", [OSError(errno.EMFILE, "Too many open files"), "421 4.7.0 Too many connections"]
)
async def test_a_limit_on_further_connections_is_no_outage(
    server: SmtpServer, mailer_to: MakeMailer, monkeypatch: pytest.MonkeyPatch, limit: OSError | str
) -> None:
    """Mail on the open connections continues. Only the mail without a connection is deferred."""
    mailer = mailer_to(server)
    server.delay["dot"] = 0.2
    first = asyncio.create_task(send(mailer))
    while not server.received:  # noqa: ASYNC110 -- a test may poll
        await asyncio.sleep(0.005)
    if isinstance(limit, str):
        server.always["connect"] = limit
    else:

        async def dial(*_: object) -> None:
            raise limit

        monkeypatch.setattr(connection, "dial", dial)
    error = await failure(send(mailer))
    await first
    assert isinstance(error, MailDeferred)
    assert not isinstance(error, ServerUnavailable)
    await mailer.close()
    assert isinstance(await failure(send(mailer)), ServerUnavailable)


async def test_a_server_without_ehlo_gets_helo(server: SmtpServer, mailer_to: MakeMailer) -> None:
    server.always |= {"ehlo": "502 5.5.1 What?", "helo": "250 test"}
    await send(mailer_to(server))
    assert [line.split()[0] for line in server.commands[:3]] == ["EHLO", "HELO", "MAIL"]


ODD_SUCCESS = {
    "connect": "299 Welcome",
    "ehlo": "251-test\r\n251-PIPELINING\r\n251 AUTH PLAIN",
    "auth": "299 Welcome",
    "mail": "259 Fine",
    "rcpt": "252 Cannot verify, but will take it",
    "data": "399 Go ahead",
    "dot": "252 2.0.0 Queued, delivery will be attempted",
    "rset": "299 Fine",
    "noop": "299 Fine",
    "quit": "299 Bye",
}


@pytest.mark.parametrize("stage", ODD_SUCCESS)
async def test_an_unlisted_code_is_understood_by_its_first_digit(
    server: SmtpServer, mailer_to: MakeMailer, stage: str
) -> None:
    """RFC 5321, section 4.2. No second copy is sent."""
    server.always[stage] = ODD_SUCCESS[stage]
    server.once["rcpt"].extend(["550 5.0.0 Never"] if stage == "rset" else [])
    mailer = mailer_to(server, **LOGIN)
    assert await mailer.check()
    if stage == "rset":
        await failure(send(mailer))
    await send(mailer)
    assert (len(server.received), server.open_total) == (1, 1)
    await mailer.close()


@pytest.mark.parametrize(
    ("hostname", "setting", "announced"),
    [
        ("mail.example.com", None, "mail.example.com"),
        ("mail.example.com", "web1.example.org", "web1.example.org"),
        ("web1", "web1", "web1"),
        ("web1", None, "[127.0.0.1]"),
        ("web_1.example.com", None, "[127.0.0.1]"),
        ("", None, "[127.0.0.1]"),
    ],
)
async def test_ehlo_announces_a_full_name_or_an_address_literal(
    server: SmtpServer,
    mailer_to: MakeMailer,
    monkeypatch: pytest.MonkeyPatch,
    hostname: str,
    setting: str | None,
    announced: str,
) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: hostname)
    await send(mailer_to(server, local_hostname=setting))
    assert server.commands[0] == f"EHLO {announced}"


@pytest.mark.parametrize(
    ("address", "literal"),
    [
        ("192.0.2.1", "[192.0.2.1]"),
        ("2001:db8::1", "[IPv6:2001:db8::1]"),
        ("fe80::1%eth0", "[IPv6:fe80::1]"),
    ],
)
def test_an_address_literal_is_written_in_brackets(address: str, literal: str) -> None:
    assert connection.address_literal(address) == literal


# -- credentials


@pytest.fixture
def trusted(certificate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trust the server's certificate."""
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))


@pytest.fixture
async def starttls_server(server_tls: ssl.SSLContext) -> AsyncIterator[SmtpServer]:
    async with SmtpServer(starttls=server_tls) as smtp_server:
        yield smtp_server


@pytest.fixture
async def tls_server(server_tls: ssl.SSLContext) -> AsyncIterator[SmtpServer]:
    async with SmtpServer(tls=server_tls) as smtp_server:
        yield smtp_server


LOGIN = {"username": "ada", "password": "secret"}
AUTH = "AUTH PLAIN AGFkYQBzZWNyZXQ="


@pytest.mark.usefixtures("trusted")
async def test_starttls_comes_before_the_login(
    starttls_server: SmtpServer, mailer_to: MakeMailer
) -> None:
    await send(mailer_to(starttls_server, security="starttls", timeout=5, **LOGIN))
    verbs = [line.split()[0] for line in starttls_server.commands]
    assert verbs == ["EHLO", "STARTTLS", "EHLO", "AUTH", "MAIL", "RCPT", "DATA"]
    assert AUTH in starttls_server.commands
    assert starttls_server.received


@pytest.mark.usefixtures("trusted")
async def test_any_success_code_for_starttls_begins_tls(
    starttls_server: SmtpServer, mailer_to: MakeMailer
) -> None:
    starttls_server.always["starttls"] = "221 Begin"
    await send(mailer_to(starttls_server, security="starttls", timeout=5))
    assert starttls_server.received


@pytest.mark.usefixtures("trusted")
async def test_replies_injected_before_tls_end_the_connection(
    starttls_server: SmtpServer, mailer_to: MakeMailer
) -> None:
    """Otherwise they would count as replies under TLS (RFC 3207, section 6)."""
    starttls_server.always["starttls"] = "220 Ready\r\n250-test\r\n250 AUTH PLAIN"
    mailer = mailer_to(starttls_server, security="starttls", timeout=5, **LOGIN)
    assert isinstance(await failure(send(mailer)), ServerUnavailable)
    assert AUTH not in starttls_server.commands


@pytest.mark.usefixtures("trusted")
async def test_a_refused_starttls_is_an_outage(
    starttls_server: SmtpServer, mailer_to: MakeMailer
) -> None:
    starttls_server.always["starttls"] = "502 5.5.1 No"
    error = await failure(send(mailer_to(starttls_server, security="starttls", timeout=5)))
    assert isinstance(error, ServerUnavailable)
    assert (error.detail, error.smtp_code) == ("502 5.5.1 No", 502)


@pytest.mark.usefixtures("trusted")
async def test_with_implicit_tls_the_handshake_comes_first(
    tls_server: SmtpServer, mailer_to: MakeMailer
) -> None:
    await send(mailer_to(tls_server, security="tls", timeout=5, **LOGIN))
    assert AUTH in tls_server.commands
    assert tls_server.received


@pytest.mark.usefixtures("trusted")
@pytest.mark.parametrize("stage", ["auth", "mail"])
@pytest.mark.thorough
async def test_the_socket_is_closed_if_the_server_stops_reading_under_tls(
    tls_server: SmtpServer, mailer_to: MakeMailer, stage: str
) -> None:
    tls_server.always[stage] = DEAF
    mailer = mailer_to(tls_server, security="tls", timeout=1, **LOGIN)
    sending = asyncio.create_task(send(mailer))
    while not any(line.startswith(stage.upper()) for line in tls_server.commands):  # noqa: ASYNC110
        await asyncio.sleep(0.005)
    (opened,) = mailer._open
    tcp = opened.get_transport_info("socket")
    await failure(sending)
    while tcp.fileno() != -1:  # noqa: ASYNC110 -- a test may poll
        await asyncio.sleep(0.005)
    assert mailer.open_connections == 0


async def test_a_wrong_password_is_temporary_and_never_shown(
    server: SmtpServer, mailer_to: MakeMailer
) -> None:
    server.always["auth"] = f"535 5.7.8 Go away: {AUTH}"
    error = await failure(send(mailer_to(server, **LOGIN)))
    assert isinstance(error, MailDeferred)
    assert error.smtp_code == 535
    assert error.detail == "The SMTP server refused our login: 535 5.7.8"


# -- reused connections


async def test_a_connection_is_reused(server: SmtpServer, mailer_to: MakeMailer) -> None:
    mailer = mailer_to(server)
    for number in range(5):
        await send(mailer, f"task-{number}")
    assert server.open_total == mailer.open_connections == 1
    assert [line.split()[0] for line in server.commands].count("EHLO") == 1


@pytest.mark.parametrize("stage", ["mail", "rcpt", "data", "dot"])
async def test_a_connection_is_reused_after_a_refusal(
    server: SmtpServer, mailer_to: MakeMailer, stage: str
) -> None:
    server.once[stage].append("550 5.0.0 Never")
    mailer = mailer_to(server)
    await failure(send(mailer))
    await send(mailer)
    assert server.open_total == 1
    assert "RSET" in server.commands


@pytest.mark.parametrize("stage", ["mail", "rcpt", "data", "dot"])
@pytest.mark.parametrize("answer", ["451 4.0.0 Later", "550 5.0.0 Never"])
async def test_a_mail_refused_on_a_reused_connection_is_not_sent_again_on_another(
    server: SmtpServer, mailer_to: MakeMailer, stage: str, answer: str
) -> None:
    mailer = mailer_to(server)
    await send(mailer)
    server.once[stage].append(answer)
    assert (await failure(send(mailer))).smtp_code == int(answer[:3])
    assert server.open_total == 1
    assert [line[:4] for line in server.commands].count("MAIL") == 2


@pytest.mark.parametrize("answer", [DROP, HANG, "451 4.0.0 Later"])
async def test_a_connection_that_cannot_be_reset_is_not_kept(
    server: SmtpServer, mailer_to: MakeMailer, monkeypatch: pytest.MonkeyPatch, answer: str
) -> None:
    monkeypatch.setattr(connection, "GOODBYE_SECONDS", 0.1)
    server.once["rcpt"].append("550 5.0.0 Never")
    server.once["rset"].append(answer)
    mailer = mailer_to(server)
    assert (await failure(send(mailer))).smtp_code == 550
    assert mailer.open_connections == 0
    await send(mailer)


async def test_a_sender_cancelled_while_resetting_leaves_no_connection(
    server: SmtpServer, mailer_to: MakeMailer
) -> None:
    server.once["rcpt"].append("550 5.0.0 Never")
    server.once["rset"].append(HANG)
    mailer = mailer_to(server)
    sending = asyncio.create_task(send(mailer))
    while "RSET" not in server.commands:  # noqa: ASYNC110 -- a test may poll
        await asyncio.sleep(0.005)
    sending.cancel()
    with pytest.raises(asyncio.CancelledError):
        await sending
    assert mailer.open_connections == 0


@pytest.mark.parametrize("answer", [DROP, "421 4.7.0 Too many mails on this connection"])
async def test_a_reused_connection_that_ends_at_mail_is_replaced_without_an_error(
    server: SmtpServer, mailer_to: MakeMailer, answer: str
) -> None:
    mailer = mailer_to(server)
    await send(mailer)
    server.once["mail"].append(answer)
    await send(mailer)
    assert (server.open_total, len(server.received)) == (2, 2)


@pytest.mark.parametrize("stage", ["rcpt", "data", "dot"])
async def test_a_reused_connection_that_ends_after_mail_is_not_replaced_within_the_attempt(
    server: SmtpServer, mailer_to: MakeMailer, stage: str
) -> None:
    mailer = mailer_to(server)
    await send(mailer)
    server.once[stage].append(DROP)
    assert isinstance(await failure(send(mailer)), MailDeferred)
    assert server.open_total == 1


async def test_a_connection_that_the_server_closed_while_idle_is_replaced(
    server: SmtpServer, mailer_to: MakeMailer
) -> None:
    mailer = mailer_to(server)
    await send(mailer)
    await server.drop_connections()
    await asyncio.sleep(0.05)
    assert mailer.open_connections == 0
    await send(mailer)
    assert server.open_total == 2


async def test_an_idle_connection_is_closed_with_quit(
    server: SmtpServer, mailer_to: MakeMailer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(smtp, "IDLE_SECONDS", 0.05)
    mailer = mailer_to(server)
    await send(mailer)
    while mailer.open_connections:  # noqa: ASYNC110 -- a test may poll
        await asyncio.sleep(0.005)
    assert server.commands[-1] == "QUIT"
    await send(mailer)
    assert server.open_total == 2


async def test_a_connection_counts_towards_the_limit_until_quit_is_answered(
    server: SmtpServer, mailer_to: MakeMailer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(smtp, "IDLE_SECONDS", 0.01)
    server.delay["quit"] = 0.1
    mailer = mailer_to(server, connections=1)
    await send(mailer)
    while "QUIT" not in server.commands:  # noqa: ASYNC110 -- a test may poll
        await asyncio.sleep(0.005)
    await send(mailer)
    assert (server.open_most, server.open_total) == (1, 2)


@pytest.mark.parametrize("stage", STAGES)
async def test_a_cancelled_sender_releases_its_connection_and_its_slot(
    server: SmtpServer, mailer_to: MakeMailer, stage: str
) -> None:
    server.always[stage] = HANG
    mailer = mailer_to(server, connections=1, timeout=60, data_timeout=60)
    sending = asyncio.create_task(send(mailer))
    await asyncio.sleep(0.05)
    assert mailer.open_connections == 1
    sending.cancel()
    with pytest.raises(asyncio.CancelledError):
        await sending
    assert mailer.open_connections == 0
    server.always.clear()
    await send(mailer)


async def test_the_limit_on_connections_holds_while_they_fail_and_are_replaced(
    server: SmtpServer, mailer_to: MakeMailer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(smtp, "IDLE_SECONDS", 0.001)
    mailer = mailer_to(server, connections=3, timeout=5, data_timeout=5)
    seen = 0

    async def watch() -> None:
        nonlocal seen
        while True:
            seen = max(seen, mailer.open_connections)
            await asyncio.sleep(0)

    watching = asyncio.create_task(watch())
    for stage in STAGES[1:]:
        server.once[stage].extend([DROP, "421 4.0.0 Later", "550 5.0.0 Never"] * 3)
    await asyncio.gather(
        *(send(mailer, f"task-{number}") for number in range(100)), return_exceptions=True
    )
    watching.cancel()
    assert seen == 3
    assert len(server.received) > 50


# -- the check for readiness


async def test_a_server_that_greets_is_reachable(server: SmtpServer, mailer_to: MakeMailer) -> None:
    mailer = mailer_to(server)
    assert await mailer.check()
    await send(mailer)
    assert server.open_total == 1


@pytest.mark.parametrize("answer", [DROP, "421 4.7.0 Too many commands on this connection"])
async def test_a_server_that_closed_the_idle_connection_is_reachable(
    server: SmtpServer, mailer_to: MakeMailer, answer: str
) -> None:
    """The check opens another connection when the idle one closes at NOOP."""
    mailer = mailer_to(server)
    await send(mailer)
    server.once["noop"].append(answer)
    assert await mailer.check()
    assert server.open_total == 2


async def test_a_server_that_refuses_the_check_is_not_reachable(
    server: SmtpServer, mailer_to: MakeMailer
) -> None:
    mailer = mailer_to(server)
    await send(mailer)
    server.always["noop"] = "554 5.0.0 No"
    assert not await mailer.check()
    assert server.open_total == 1


async def test_a_server_that_is_down_is_not_reachable(
    server: SmtpServer, mailer_to: MakeMailer
) -> None:
    mailer = mailer_to(server)
    await server.stop()
    assert not await mailer.check()
    await server.start()


@pytest.mark.parametrize("answer", ["554 5.0.0 No", DROP, HANG])
async def test_a_server_that_does_not_greet_is_not_reachable(
    server: SmtpServer, mailer_to: MakeMailer, monkeypatch: pytest.MonkeyPatch, answer: str
) -> None:
    monkeypatch.setattr(smtp, "CHECK_SECONDS", 0.1)
    server.always["connect"] = answer
    mailer = mailer_to(server, timeout=60)
    assert not await mailer.check()
    assert mailer.open_connections == 0


async def test_the_result_of_a_check_is_cached_for_a_while(
    server: SmtpServer, mailer_to: MakeMailer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(smtp, "CHECK_CACHE_SECONDS", 0.1)
    mailer = mailer_to(server)
    assert all(await asyncio.gather(*(mailer.check() for _ in range(20))))
    assert server.commands.count("NOOP") == 1
    await asyncio.sleep(0.15)
    assert await mailer.check()
    assert server.commands.count("NOOP") == 2


async def test_a_busy_mailer_reports_the_result_of_its_last_connection(
    server: SmtpServer, mailer_to: MakeMailer
) -> None:
    server.delay["connect"] = 0.1
    server.delay["dot"] = 0.3
    mailer = mailer_to(server, connections=1, timeout=5, data_timeout=5)
    sending = asyncio.create_task(send(mailer))
    await asyncio.sleep(0.05)
    assert not await mailer.check()
    await asyncio.sleep(0.15)
    assert await mailer.check()
    await sending
    assert server.open_total == 1


# -- closing the mailer


async def test_close_sends_quit_on_each_connection(
    server: SmtpServer, mailer_to: MakeMailer
) -> None:
    mailer = mailer_to(server)
    await asyncio.gather(send(mailer), send(mailer))
    await mailer.close()
    assert mailer.open_connections == 0
    assert server.commands.count("QUIT") == 2


@pytest.mark.parametrize("answer", [HANG, DROP, "451 4.0.0 Later"])
async def test_close_does_not_wait_for_a_server_that_keeps_the_connection_open(
    server: SmtpServer, mailer_to: MakeMailer, monkeypatch: pytest.MonkeyPatch, answer: str
) -> None:
    monkeypatch.setattr(connection, "GOODBYE_SECONDS", 0.1)
    server.always["quit"] = answer
    mailer = mailer_to(server)
    await send(mailer)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(1):
            await mailer.close()
    assert mailer.open_connections == 0
