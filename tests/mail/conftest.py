"""Fixtures for the mail tests: SMTP servers, mailers and certificates."""

import ssl
from pathlib import Path

import pytest

from tests.support.certificates import make_certificate, server_context
from tests.support.mails import mailer_to, server

__all__ = ["mailer_to", "server"]


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """A file with a self-signed certificate for 127.0.0.1 and its key."""
    return make_certificate(tmp_path)


@pytest.fixture
def server_tls(certificate: Path) -> ssl.SSLContext:
    """The TLS settings of a server with this certificate."""
    return server_context(certificate)
