"""swaks talks to the embedded catcher, which answers as RFC 5321 says, and never crashes."""

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.mail.caught import Caught
from tests.support.service import COMMAND, Process, free_port, mails_in, wait_until_open

STAGES = ["CONNECT", "FIRST-HELO", "MAIL", "RCPT"]
WHOLE = [220, 250, 250, 250, 354, 250, 221]  # connect, EHLO, MAIL, RCPT, DATA, dot, QUIT

_REPLY = re.compile(r"^<(?:-|\*\*) +(\d{3})(?: |$)", re.MULTILINE)  # a reply's last line


class Client:
    """Runs swaks against a catcher."""

    def __init__(self, swaks: str, directory: Path) -> None:
        self._command = [swaks, "--from", "eve@example.com", "--to", "ada@example.org"]
        self._command += ["--timeout", "5"]
        self._directory = directory
        self.port = free_port()
        self.transcript = ""

    def converse(self, *options: str) -> list[int]:
        """Run swaks once, and return the codes of the replies. `transcript` keeps all output."""
        command = [*self._command, "--server", f"127.0.0.1:{self.port}", *options]
        done = subprocess.run(command, capture_output=True, check=False)
        self.transcript = (done.stdout + done.stderr).decode()
        assert "Timeout" not in self.transcript
        return [int(code) for code in _REPLY.findall(self.transcript)]

    @property
    def caught(self) -> list[Caught]:
        """The caught mails, newest first."""
        return mails_in(self._directory)

    def empty_the_inbox(self) -> None:
        """Delete all caught mails."""
        for mail in (self._directory / "inbox").iterdir():
            mail.unlink()


@pytest.fixture(scope="module")
def with_catcher(swaks: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """A client with a catcher, for all tests of this module."""
    directory = tmp_path_factory.mktemp("catcher")
    client = Client(swaks, directory)
    command = (*COMMAND, "catcher")
    with Process(directory, command=command, smtp_port=client.port) as catcher:
        wait_until_open(client.port)
        yield client
        assert "Traceback" not in catcher.log
        assert catcher.stop() == 0


@pytest.fixture
def client(with_catcher: Client) -> Iterator[Client]:
    """A client with an empty catcher. After the test, the catcher must still accept a mail."""
    yield with_catcher
    assert with_catcher.converse() == WHOLE
    with_catcher.empty_the_inbox()


@pytest.mark.parametrize("options", [(), ("--pipeline",)], ids=["plain", "pipelining"])
def test_a_mail_is_caught(client: Client, options: tuple[str, ...]) -> None:
    """The catcher does not offer PIPELINING, so swaks does not pipeline."""
    assert client.converse("--header", "Subject: Hello", *options) == WHOLE
    assert [mail.subject for mail in client.caught] == ["Hello"]


def test_lines_over_1000_bytes_and_commands_over_512_bytes_are_refused(client: Client) -> None:
    """Both limits include CRLF (RFC 5321, sections 4.5.3.1.4 and 4.5.3.1.6)."""
    assert client.converse("--data", "Subject: long\\n\\n" + "x" * 998 + "\\n") == WHOLE
    assert len(client.caught) == 1

    assert client.converse("--data", "Subject: longer\\n\\n" + "x" * 3000 + "\\n")[-2:] == [
        500,
        221,
    ]
    assert client.converse("--ehlo", "x" * 600)[-2:] == [500, 221]
    assert len(client.caught) == 1


def test_a_dot_between_bare_newlines_does_not_end_a_mail(client: Client, tmp_path: Path) -> None:
    """The lines after it are text of the mail, and no second mail."""
    body = tmp_path / "body"
    body.write_bytes(
        b"Subject: bare\r\n\r\na\n.\nMAIL FROM:<mallory@example.com>\nb\r.\rc\r\n.\r\n"
    )
    assert client.converse("--no-data-fixup", "--data", f"@{body}")[:6] == WHOLE[:6]
    [mail] = client.caught
    assert mail.text is not None
    assert "MAIL FROM:<mallory@example.com>" in mail.text


def test_unknown_commands_are_answered_500_and_the_session_continues(client: Client) -> None:
    assert client.converse("--protocol", "LMTP") == [220, 500, 221]
    assert client.converse("--from", "eve@example.com>\r\nBOGUS <x") == [220, 250, 250, 500, 250]
    assert client.caught == []


def test_the_catcher_offers_neither_tls_nor_a_login(client: Client) -> None:
    """The catcher is for development, on loopback."""
    for options in (["--tls"], ["--auth", "--auth-user", "ada", "--auth-password", "secret"]):
        assert client.converse(*options) == [220, 250, 221]
        assert "Host did not advertise" in client.transcript


def test_a_client_may_disconnect_at_any_stage(client: Client) -> None:
    """It may send QUIT, close without QUIT, or close before it has read the reply."""
    for number, stage in enumerate(STAGES, 1):
        assert client.converse("--quit-after", stage) == [*WHOLE[:number], 221]
        assert client.converse("--drop-after", stage) == WHOLE[:number]
    for stage in [*STAGES[1:], "DATA"]:  # a client sends nothing to connect
        client.converse("--drop-after-send", stage)
    assert client.caught == []

    assert client.converse("--drop-after", "DOT") == WHOLE[:-1]
    assert len(client.caught) == 1
    client.converse("--drop-after-send", "DOT")  # the mail may or may not be caught
