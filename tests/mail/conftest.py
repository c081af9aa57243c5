"""What the mail tests share: a server to misbehave, a mailer to suffer it, certificates."""

import ssl
from pathlib import Path

import pytest

from tests.support.certificates import make_certificate, server_context
from tests.support.mails import mailer_to, server

__all__ = ["mailer_to", "server"]


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """A certificate for 127.0.0.1 and its key in one file; it is its own authority."""
    return make_certificate(tmp_path)


@pytest.fixture
def server_tls(certificate: Path) -> ssl.SSLContext:
    """What a server with that certificate needs."""
    return server_context(certificate)
