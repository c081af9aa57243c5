"""swaks talks to the embedded catcher: it answers as RFC 5321 says, and nothing makes it die."""

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.mail.caught import Caught
from tests.support.service import COMMAND, Process, free_port, mails_in, wait_until_open

STAGES = ["CONNECT", "FIRST-HELO", "MAIL", "RCPT"]
WHOLE = [220, 250, 250, 250, 354, 250, 221]  # connect, EHLO, MAIL, RCPT, DATA, dot, QUIT

_REPLY = re.compile(r"^<(?:-|\*\*) +(\d{3})(?: |$)", re.MULTILINE)  # the last line of each


class Client:
    """swaks, and the catcher that it talks to."""

    def __init__(self, swaks: str, directory: Path) -> None:
        self._command = [swaks, "--from", "eve@example.com", "--to", "ada@example.org"]
        self._command += ["--timeout", "5"]
        self._directory = directory
        self.port = free_port()
        self.said = ""

    def talk(self, *options: str) -> list[int]:
        """Hold one conversation; returns the codes of the replies, and leaves all in `said`."""
        command = [*self._command, "--server", f"127.0.0.1:{self.port}", *options]
        done = subprocess.run(command, capture_output=True, check=False)
        self.said = (done.stdout + done.stderr).decode()
        assert "Timeout" not in self.said
        return [int(code) for code in _REPLY.findall(self.said)]

    @property
    def caught(self) -> list[Caught]:
        """What the catcher keeps, newest first."""
        return mails_in(self._directory)

    def forget(self) -> None:
        """Empty the inbox."""
        for mail in (self._directory / "inbox").iterdir():
            mail.unlink()


@pytest.fixture(scope="module")
def with_catcher(swaks: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """One catcher for all tests."""
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
    """A client and a catcher without mails, which takes one afterwards as if nothing had been."""
    yield with_catcher
    assert with_catcher.talk() == WHOLE
    with_catcher.forget()


@pytest.mark.parametrize("options", [(), ("--pipeline",)], ids=["plain", "pipelining"])
def test_a_mail_is_caught(client: Client, options: tuple[str, ...]) -> None:
    """Whoever would pipeline is not told that he may, and so does not."""
    assert client.talk("--header", "Subject: Hello", *options) == WHOLE
    assert [mail.subject for mail in client.caught] == ["Hello"]


def test_a_line_has_a_thousand_characters_at_most(client: Client) -> None:
    """Which RFC 5321 counts with CRLF (4.5.3.1.6); a command has 512 (4.5.3.1.4)."""
    assert client.talk("--data", "Subject: long\\n\\n" + "x" * 998 + "\\n") == WHOLE
    assert len(client.caught) == 1

    assert client.talk("--data", "Subject: longer\\n\\n" + "x" * 3000 + "\\n")[-2:] == [500, 221]
    assert client.talk("--ehlo", "x" * 600)[-2:] == [500, 221]
    assert len(client.caught) == 1


def test_bare_newlines_end_nothing(client: Client, tmp_path: Path) -> None:
    """What stands behind a dot between them is text, not a second mail."""
    body = tmp_path / "body"
    body.write_bytes(
        b"Subject: bare\r\n\r\na\n.\nMAIL FROM:<mallory@example.com>\nb\r.\rc\r\n.\r\n"
    )
    assert client.talk("--no-data-fixup", "--data", f"@{body}")[:6] == WHOLE[:6]
    [mail] = client.caught
    assert mail.text is not None
    assert "MAIL FROM:<mallory@example.com>" in mail.text


def test_unknown_commands_are_answered_500(client: Client) -> None:
    """And the conversation goes on."""
    assert client.talk("--protocol", "LMTP") == [220, 500, 221]
    assert client.talk("--from", "eve@example.com>\r\nBOGUS <x") == [220, 250, 250, 500, 250]
    assert client.caught == []


def test_nobody_is_asked_for_a_login_or_given_tls(client: Client) -> None:
    """It is for development, on loopback."""
    for options in (["--tls"], ["--auth", "--auth-user", "ada", "--auth-password", "secret"]):
        assert client.talk(*options) == [220, 250, 221]
        assert "Host did not advertise" in client.said


def test_a_client_may_leave_at_any_stage(client: Client) -> None:
    """With QUIT, without a word, or without hearing the answer."""
    for number, stage in enumerate(STAGES, 1):
        assert client.talk("--quit-after", stage) == [*WHOLE[:number], 221]
        assert client.talk("--drop-after", stage) == WHOLE[:number]
    for stage in [*STAGES[1:], "DATA"]:  # a client sends nothing to connect
        client.talk("--drop-after-send", stage)
    assert client.caught == []

    assert client.talk("--drop-after", "DOT") == WHOLE[:-1]
    assert len(client.caught) == 1
    client.talk("--drop-after-send", "DOT")  # taken or not, nobody knows
