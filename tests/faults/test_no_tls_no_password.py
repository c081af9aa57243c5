"""The server's certificate is bad, or STARTTLS is not offered, was stripped off, or is refused.

The password does not leave us, in clear or at all, and nothing of the mail does. The mail is tried
again, since somebody may mend it, and fails after the last attempt.
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
class Doubtful:
    """A server that must not be trusted."""

    security: Security = "starttls"
    certificate: dict[str, int | str] | None = None  # what to make it with
    trusted: bool = False  # its authority
    answers: dict[str, str] = field(default_factory=dict)
    complaint: str = ""  # a part of the error's detail
    timeout: float = 5  # seconds for each step

    def make(self, directory: Path) -> tuple[SmtpServer, Path | None]:
        """The server, and the certificate that the client is to trust."""
        if self.certificate is None:
            server, path = SmtpServer(), None
        else:
            path = make_certificate(directory, **self.certificate)  # type: ignore[arg-type]
            server = SmtpServer(**{self.security: server_context(path)})
        server.always |= self.answers
        return server, path if self.trusted else None


DOUBTFUL = {
    "of an unknown authority": Doubtful(certificate={}, complaint="CERTIFICATE_VERIFY_FAILED"),
    "without STARTTLS": Doubtful(complaint="STARTTLS extension not supported"),
    "of an unknown authority, TLS": Doubtful(
        "tls", certificate={}, complaint="CERTIFICATE_VERIFY_FAILED"
    ),
    "with the name of another": Doubtful(
        certificate={"name": "DNS:mail.example.org"}, trusted=True, complaint="mismatch"
    ),
    "expired": Doubtful(certificate={"days": -1}, trusted=True, complaint="expired"),
    "whose STARTTLS was blotted out": Doubtful(
        answers={"ehlo": "250-test\r\n250-XXXXXXXA\r\n250 AUTH PLAIN"}, complaint="not supported"
    ),
    "that puts STARTTLS off": Doubtful(
        answers={**OFFERED, "starttls": "454 4.7.0 Later"}, complaint="454 4.7.0 Later"
    ),
    "that refuses STARTTLS": Doubtful(
        answers={**OFFERED, "starttls": "502 5.5.1 No"}, complaint="502 5.5.1 No"
    ),
    "that never begins TLS": Doubtful(
        answers=OFFERED, complaint="did not answer in time", timeout=TIMEOUT
    ),
}


def test_the_mail_is_tried_again_and_then_fails(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    tried: Tried,
) -> None:
    """The whole way, from POST to status; the short form takes two servers."""
    names = list(DOUBTFUL)[: form(2, len(DOUBTFUL))]
    patience, attempts, heard = form(2.0, 30.0), 0, list[str]()
    for name in names:
        doubtful = DOUBTFUL[name]
        server, trusted = doubtful.make(tmp_path)
        monkeypatch.setenv("SSL_CERT_FILE", str(trusted or ""))
        with in_a_thread(server):
            failed = send_to(server, doubtful, tmp_path, patience)
        assert failed["attempts"] > 1
        attempts += failed["attempts"]
        assert doubtful.complaint in failed["error"]["detail"]
        heard += told_to(server)

    assert heard == []
    log = capfd.readouterr().err
    assert log.count("a service is away") == len(names)
    assert LOGIN["password"] not in log
    tried(
        f"{len(names)} doubtful servers, {attempts} attempts in {patience:g} s each",
        f"all failed at the end, {auths(heard)} AUTH",
    )


def send_to(server: SmtpServer, doubtful: Doubtful, directory: Path, patience: float) -> Json:
    """Send a mail, for so many seconds, until it has failed; returns the task."""
    settings = settings_in(
        directory,
        catcher=False,
        smtp_port=server.port,
        smtp_security=doubtful.security,
        smtp_username=LOGIN["username"],
        smtp_password=LOGIN["password"],
        smtp_timeout=doubtful.timeout,
        mail_retry_seconds=patience,
    )
    with TestClient(create_app(settings)) as client:
        task = client.post("/send-notification/ada@example.com").json()
        return wait_for(client, task["id"], "failed", at_most=2 * patience + PATIENCE)


@pytest.mark.anyio
@pytest.mark.parametrize("name", DOUBTFUL)
async def test_a_doubtful_server_gets_no_credentials(
    name: str, mailer_to: MakeMailer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    doubtful = DOUBTFUL[name]
    server, trusted = doubtful.make(tmp_path)
    if trusted:
        monkeypatch.setenv("SSL_CERT_FILE", str(trusted))
    async with server:
        mailer = mailer_to(server, security=doubtful.security, timeout=doubtful.timeout, **LOGIN)
        error = await failure(send(mailer))
    assert isinstance(error, MailDeferred)
    assert doubtful.complaint in error.detail
    assert told_to(server) == []


@pytest.fixture
async def forger(tmp_path: Path) -> AsyncIterator[SmtpServer]:
    """A server whose certificate is its own work."""
    server, _ = DOUBTFUL["of an unknown authority"].make(tmp_path)
    async with server:
        yield server


@pytest.mark.anyio
async def test_control_a_client_that_checks_no_certificate_tells_the_password(
    forger: SmtpServer, tried: Tried
) -> None:
    """The standard library's, as tutorials use it."""

    def send_with_smtplib() -> None:
        with smtplib.SMTP("127.0.0.1", forger.port, timeout=5) as client:
            client.starttls()
            client.login(user=LOGIN["username"], password=LOGIN["password"])

    await asyncio.to_thread(send_with_smtplib)
    assert auths(told_to(forger)) == 1
    tried("smtplib's starttls and login, with a bad certificate", "1 AUTH")


@pytest.mark.anyio
async def test_control_a_client_that_does_without_starttls_tells_the_password(
    server: SmtpServer, tried: Tried
) -> None:
    """It upgrades where that is offered: whoever strips the offer reads the password."""
    await aiosmtplib.send(
        a_mail(),
        sender=SENDER,
        recipients=[RECIPIENT],
        hostname="127.0.0.1",
        port=server.port,
        username=LOGIN["username"],
        password=LOGIN["password"],
    )
    assert auths(told_to(server)) == 1
    tried("aiosmtplib.send as it is, with STARTTLS stripped", "1 AUTH in clear")


def told_to(server: SmtpServer) -> list[str]:
    """What the server heard that only one we trust may hear."""
    harmless = ("EHLO", "STARTTLS", "QUIT", "\x16\x03")  # the last is how TLS begins
    return [line for line in server.commands if not line.upper().startswith(harmless)]


def auths(heard: list[str]) -> int:
    """How often the password was told."""
    return sum(line.upper().startswith("AUTH") for line in heard)
