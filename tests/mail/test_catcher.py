"""The catcher: every mail is kept, shown, and survives a restart."""

import asyncio
import re
import smtplib
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from app.mail.catcher import Catcher
from app.mail.smtp import Mailer
from tests.support.mails import RECIPIENT, SENDER, a_mail

pytestmark = pytest.mark.anyio


@pytest.fixture
async def catcher(tmp_path: Path) -> AsyncIterator[Catcher]:
    catcher = Catcher("127.0.0.1", 0, tmp_path / "mail", keep=3)
    await catcher.start()
    yield catcher
    await catcher.stop()


async def deliver(catcher: Catcher, raw: bytes, recipients: tuple[str, ...] = (RECIPIENT,)) -> None:
    """Send bytes of any kind, as any client might."""

    def client() -> None:
        with smtplib.SMTP("127.0.0.1", catcher.port, timeout=5) as smtp:
            smtp.sendmail(SENDER, recipients, raw)

    await asyncio.to_thread(client)


def files(directory: Path) -> list[str]:
    return [path.name for path in directory.iterdir()]


async def test_a_mail_is_caught_with_its_envelope(catcher: Catcher) -> None:
    mailer = Mailer(host="127.0.0.1", port=catcher.port)
    reply = await mailer.send(a_mail("7f3a"), sender=SENDER, recipient=RECIPIENT)
    (caught,) = catcher.list()
    assert reply == f"250 2.0.0 Caught as {caught.id}"
    assert (caught.sender, caught.recipients) == (SENDER, (RECIPIENT,))
    assert caught.message_id == "<7f3a@example.com>"
    assert caught.subject == "Hello"
    assert caught.text == "Dear Ada,\n.\n..\nyours\n"
    assert caught.html is None
    assert caught.raw == a_mail("7f3a").as_bytes()
    assert ("To", RECIPIENT) in caught.headers
    assert catcher.get(caught.id) == caught
    await mailer.close()


async def test_the_newest_come_first_and_the_oldest_go(catcher: Catcher, tmp_path: Path) -> None:
    for number in range(5):
        await deliver(catcher, b"Subject: %d\r\n\r\nx" % number)
    assert [caught.subject for caught in catcher.list()] == ["4", "3", "2"]
    assert [caught.subject for caught in catcher.list(limit=1)] == ["4"]
    assert len(files(tmp_path / "mail")) == 3


async def test_mails_survive_a_restart_and_half_written_ones_do_not(tmp_path: Path) -> None:
    first = Catcher("127.0.0.1", 0, tmp_path, keep=2)
    await first.start()
    await deliver(first, b"Subject: kept\r\n\r\nx")
    (tmp_path / "1.tmp").write_bytes(b"half")
    await first.stop()

    second = Catcher("127.0.0.1", 0, tmp_path, keep=2)
    await second.start()
    assert [caught.subject for caught in second.list()] == ["kept"]
    assert "1.tmp" not in files(tmp_path)
    await deliver(second, b"Subject: new\r\n\r\nx")
    await deliver(second, b"Subject: newer\r\n\r\nx")
    assert [caught.subject for caught in second.list()] == ["newer", "new"]
    await second.stop()


async def test_any_mail_is_shown_however_it_is_made(catcher: Catcher) -> None:
    await deliver(
        catcher,
        b"Content-Type: text/html; charset=no-such\r\n\r\n<p>\xe9</p>",
        (RECIPIENT, "bob@example.org"),
    )
    await deliver(catcher, b"Content-Type: image/png\r\n\r\n\x89PNG")
    picture, page = catcher.list()
    assert page.html == "<p>é</p>\n"
    assert page.recipients == (RECIPIENT, "bob@example.org")
    assert (picture.subject, picture.text, picture.html) == ("", None, None)
    assert picture.message_id is None


@pytest.mark.parametrize(
    "unknown",
    [
        "",
        "../secret",
        "..%2Fsecret",
        "1735815845000000000-0123abcd",
        "1735815845000000000-0123abcd\n",
    ],
)
async def test_an_id_that_is_not_ours_finds_nothing(
    catcher: Catcher, tmp_path: Path, unknown: str
) -> None:
    (tmp_path / "secret.eml").write_bytes(b"X-Envelope: {}\r\n")
    (tmp_path / "mail" / "stray.eml").write_bytes(b"not ours")
    assert catcher.get(unknown) is None
    assert list(catcher.list()) == []


async def test_a_mail_that_cannot_be_stored_is_deferred(catcher: Catcher, tmp_path: Path) -> None:
    (tmp_path / "mail").rmdir()
    with pytest.raises(smtplib.SMTPDataError) as deferral:
        await deliver(catcher, b"Subject: lost\r\n\r\nx")
    assert deferral.value.smtp_code == 452


async def test_a_taken_port_is_named(catcher: Catcher, tmp_path: Path) -> None:
    with pytest.raises(OSError, match=re.escape(f"127.0.0.1:{catcher.port}")):
        await Catcher("127.0.0.1", catcher.port, tmp_path).start()


async def test_stopping_ends_open_connections(catcher: Catcher) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", catcher.port)
    assert (await reader.readline()).startswith(b"220 ")
    await catcher.stop()
    assert await reader.read() == b""
    writer.close()
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", catcher.port)) != 0


async def test_it_may_be_stopped_without_a_start(tmp_path: Path) -> None:
    catcher = Catcher("127.0.0.1", 2525, tmp_path)
    assert catcher.port == 2525
    await catcher.stop()
