"""What the mail tests share: a server to misbehave, a mailer to suffer it, certificates."""

import ssl
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from app.mail.smtp import Mailer
from tests.support.mails import TIMEOUT
from tests.support.smtp_server import SmtpServer


@pytest.fixture
async def server() -> AsyncIterator[SmtpServer]:
    """An SMTP server that takes everything, until it is told otherwise."""
    async with SmtpServer() as smtp_server:
        yield smtp_server


@pytest.fixture
async def mailer_to() -> AsyncIterator[Callable[..., Mailer]]:
    """Make a mailer to a server; it is closed after the test."""
    async with AsyncExitStack() as closing:

        def make(server: SmtpServer, **settings: object) -> Mailer:
            known: dict[str, object] = {
                "host": "127.0.0.1",
                "port": server.port,
                "timeout": TIMEOUT,
                "data_timeout": TIMEOUT,
                "connections": 2,
            }
            mailer = Mailer(**(known | settings))  # type: ignore[arg-type]
            closing.push_async_callback(mailer.close)
            return mailer

        yield make


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """A certificate for 127.0.0.1 and its key in one file; it is its own authority."""
    path = tmp_path / "certificate.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    command += ["-nodes", "-days", "1", "-subj", "/CN=127.0.0.1"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", "-", "-out", "-"]
    path.write_bytes(subprocess.run(command, check=True, capture_output=True).stdout)
    return path


@pytest.fixture
def server_tls(certificate: Path) -> ssl.SSLContext:
    """What a server with that certificate needs."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    return context
