"""The SMTP server's certificate is bad, or STARTTLS is not offered, stripped, or refused.

The client sends neither the password nor any part of the mail. The mail is tried again, because an
operator may repair the server. It fails after the last attempt.
"""

import asyncio
import smtplib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import aiosmtplib
import pytest
from fastapi.testclient import TestClient

from app.mail.replies import MailDeferred
from app.mail.smtp import Security
from app.main import create_app
from tests.support.certificates import make_certificate, server_context
from tests.support.mails import RECIPIENT, SENDER, TIMEOUT, MakeMailer, a_mail, failure, send
from tests.support.service import PATIENCE, Json, settings_in, wait_for
from tests.support.smtp_server import SmtpServer, in_a_thread
from tests.support.torture import Tried, form

LOGIN = {"username": "ada", "password": "secret"}
OFFERED = {"ehlo": "250-test\r\n250-STARTTLS\r\n250 AUTH PLAIN"}


@dataclass(frozen=True)
class Untrusted:
    """An SMTP server that the client must not trust."""

    security: Security = "starttls"
    certificate: dict[str, int | str] | None = None  # arguments of make_certificate
    trusted: bool = False  # whether the client trusts the certificate's authority
    answers: dict[str, str] = field(default_factory=dict)
    complaint: str = ""  # a part of the error's detail
    timeout: float = 5  # seconds for each step

    def make(self, directory: Path) -> tuple[SmtpServer, Path | None]:
        """Return the server, and the certificate that the client must trust, or None."""
        if self.certificate is None:
            server, path = SmtpServer(), None
        else:
            path = make_certificate(directory, **self.certificate)  # type: ignore[arg-type]
            server = SmtpServer(**{self.security: server_context(path)})
        server.always |= self.answers
        return server, path if self.trusted else None


UNTRUSTED = {
    "of an unknown authority": Untrusted(certificate={}, complaint="CERTIFICATE_VERIFY_FAILED"),
    "without STARTTLS": Untrusted(complaint="STARTTLS extension not supported"),
    "of an unknown authority, TLS": Untrusted(
        "tls", certificate={}, complaint="CERTIFICATE_VERIFY_FAILED"
    ),
    "with another server's name": Untrusted(
        certificate={"name": "DNS:mail.example.org"}, trusted=True, complaint="mismatch"
    ),
    "expired": Untrusted(certificate={"days": -1}, trusted=True, complaint="expired"),
    "with STARTTLS overwritten": Untrusted(
        answers={"ehlo": "250-test\r\n250-XXXXXXXA\r\n250 AUTH PLAIN"}, complaint="not supported"
    ),
    "that defers STARTTLS": Untrusted(
        answers={**OFFERED, "starttls": "454 4.7.0 Later"}, complaint="454 4.7.0 Later"
    ),
    "that refuses STARTTLS": Untrusted(
        answers={**OFFERED, "starttls": "502 5.5.1 No"}, complaint="502 5.5.1 No"
    ),
    "that never begins TLS": Untrusted(
        answers=OFFERED, complaint="did not answer in time", timeout=TIMEOUT
    ),
}


def test_a_mail_to_an_untrusted_server_is_tried_again_and_then_fails(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    tried: Tried,
) -> None:
    """From the POST to the task's status. The short form takes only two servers."""
    names = list(UNTRUSTED)[: form(2, len(UNTRUSTED))]
    patience, attempts, heard = form(2.0, 30.0), 0, list[str]()
    for name in names:
        untrusted = UNTRUSTED[name]
        server, trusted = untrusted.make(tmp_path)
        monkeypatch.setenv("SSL_CERT_FILE", str(trusted or ""))
        with in_a_thread(server):
            failed = send_to(server, untrusted, tmp_path, patience)
        assert failed["attempts"] > 1
        attempts += failed["attempts"]
        assert untrusted.complaint in failed["error"]["detail"]
        heard += secrets_sent_to(server)

    assert heard == []
    log = capfd.readouterr().err
    assert log.count("a service is away") == len(names)
    assert LOGIN["password"] not in log
    tried(
        f"{len(names)} untrusted servers, {attempts} attempts in {patience:g} s each",
        f"all failed at the end, {count_auths(heard)} AUTH",
    )


def send_to(server: SmtpServer, untrusted: Untrusted, directory: Path, patience: float) -> Json:
    """Send a mail that is tried for `patience` seconds, and return the failed task."""
    settings = settings_in(
        directory,
        catcher=False,
        smtp_port=server.port,
        smtp_security=untrusted.security,
        smtp_username=LOGIN["username"],
        smtp_password=LOGIN["password"],
        smtp_timeout=untrusted.timeout,
        mail_retry_seconds=patience,
    )
    with TestClient(create_app(settings)) as client:
        task = client.post("/send-notification/ada@example.com").json()
        return wait_for(client, task["id"], "failed", at_most=2 * patience + PATIENCE)


@pytest.mark.anyio
@pytest.mark.parametrize("name", UNTRUSTED)
async def test_an_untrusted_server_gets_no_credentials(
    name: str, mailer_to: MakeMailer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    untrusted = UNTRUSTED[name]
    server, trusted = untrusted.make(tmp_path)
    if trusted:
        monkeypatch.setenv("SSL_CERT_FILE", str(trusted))
    async with server:
        mailer = mailer_to(server, security=untrusted.security, timeout=untrusted.timeout, **LOGIN)
        error = await failure(send(mailer))
    assert isinstance(error, MailDeferred)
    assert untrusted.complaint in error.detail
    assert secrets_sent_to(server) == []


@pytest.fixture
async def forger(tmp_path: Path) -> AsyncIterator[SmtpServer]:
    """A server with a self-signed certificate."""
    server, _ = UNTRUSTED["of an unknown authority"].make(tmp_path)
    async with server:
        yield server


@pytest.mark.anyio
async def test_control_a_client_that_checks_no_certificate_sends_the_password(
    forger: SmtpServer, tried: Tried
) -> None:
    """Tutorials use the standard library's smtplib like this."""

    def send_with_smtplib() -> None:
        with smtplib.SMTP("127.0.0.1", forger.port, timeout=5) as client:
            client.starttls()
            client.login(user=LOGIN["username"], password=LOGIN["password"])

    await asyncio.to_thread(send_with_smtplib)
    assert count_auths(secrets_sent_to(forger)) == 1
    tried("smtplib's starttls and login, with a bad certificate", "1 AUTH")


@pytest.mark.anyio
async def test_control_a_client_with_optional_starttls_sends_the_password_in_clear(
    server: SmtpServer, tried: Tried
) -> None:
    """It uses STARTTLS only if offered. An attacker strips the offer and reads the password."""
    await aiosmtplib.send(
        a_mail(),
        sender=SENDER,
        recipients=[RECIPIENT],
        hostname="127.0.0.1",
        port=server.port,
        username=LOGIN["username"],
        password=LOGIN["password"],
    )
    assert count_auths(secrets_sent_to(server)) == 1
    tried("aiosmtplib.send as it is, with STARTTLS stripped", "1 AUTH in clear")


def secrets_sent_to(server: SmtpServer) -> list[str]:
    """Return the command lines that only a trusted server may receive."""
    harmless = ("EHLO", "STARTTLS", "QUIT", "\x16\x03")  # TLS begins with the bytes 16 03
    return [line for line in server.commands if not line.upper().startswith(harmless)]


def count_auths(heard: list[str]) -> int:
    """Return how often the client sent the password."""
    return sum(line.upper().startswith("AUTH") for line in heard)
