"""The SMTP catcher stores every mail and shows it, also after a restart."""

import asyncio
import errno
import os
import re
import shutil
import smtplib
import socket
import stat
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import asdict
from pathlib import Path
from typing import NoReturn

import pytest
from structlog.testing import capture_logs

from app.mail import fault_addresses
from app.mail.catcher import MAX_RECIPIENTS, Catcher
from app.mail.smtp import Mailer
from tests.support.mails import RECIPIENT, SENDER, a_mail
from tests.support.service import PATIENCE

# Prints the most bytes that the searches need.
SEARCH = """
import sys, tracemalloc
from pathlib import Path
from app.mail.catcher import Catcher

catcher = Catcher("", 0, Path(sys.argv[1]))
tracemalloc.start()
assert len(catcher.list(["one"], limit=3)) == 3
assert catcher.list(["two"]) == []
assert catcher.find("7f3a@x") is None
print(tracemalloc.get_traced_memory()[1])
"""

pytestmark = pytest.mark.anyio


@pytest.fixture
async def catcher(tmp_path: Path) -> AsyncIterator[Catcher]:
    catcher = Catcher("127.0.0.1", 0, tmp_path / "mail", keep=3)
    await catcher.start()
    yield catcher
    await catcher.stop()


async def deliver(catcher: Catcher, raw: bytes, recipients: tuple[str, ...] = (RECIPIENT,)) -> None:
    """Send a mail of any bytes with smtplib."""

    def client() -> None:
        with smtplib.SMTP("127.0.0.1", catcher.port, timeout=5) as smtp:
            smtp.sendmail(SENDER, recipients, raw)

    await asyncio.to_thread(client)


def files(directory: Path) -> list[str]:
    return [path.name for path in directory.iterdir()]


async def test_a_mail_is_caught_with_its_envelope(catcher: Catcher) -> None:
    mailer = Mailer(host="127.0.0.1", port=catcher.port)
    reply = await mailer.send(a_mail("7f3a"), sender=SENDER, recipient=RECIPIENT)
    (listed,) = catcher.list()
    caught = catcher.get(listed.id)
    assert caught is not None
    assert reply == f"250 2.0.0 Caught as {caught.id}"
    assert (caught.sender, caught.recipients) == (SENDER, (RECIPIENT,))
    assert caught.message_id == "<7f3a@example.com>"
    assert caught.subject == "Hello"
    assert caught.text == "Dear Ada,\n.\n..\nyours\n"
    assert caught.html is None
    assert b"".join(catcher.read_source(caught.id)) == a_mail("7f3a").as_bytes()
    assert ("To", RECIPIENT) in caught.headers
    assert all(getattr(caught, name) == fact for name, fact in asdict(listed).items())
    await mailer.close()


async def test_the_list_is_newest_first_and_the_oldest_mails_are_removed(
    catcher: Catcher, tmp_path: Path
) -> None:
    for number in range(5):
        await deliver(catcher, b"Subject: %d\r\n\r\nx" % number)
    assert [caught.subject for caught in catcher.list()] == ["4", "3", "2"]
    assert [caught.subject for caught in catcher.list(limit=1)] == ["4"]
    assert len(files(tmp_path / "mail")) == 3


async def test_mails_survive_a_restart_and_half_written_mails_are_removed(tmp_path: Path) -> None:
    first = Catcher("127.0.0.1", 0, tmp_path, keep=2)
    await first.start()
    await deliver(first, b"Subject: kept\r\n\r\nx")
    half_written = f"{1:019}-0123abcd.tmp"
    (tmp_path / half_written).write_bytes(b"half")
    (tmp_path / "other.tmp").write_bytes(b"of another program")
    (tmp_path / "directory.tmp").mkdir()
    await first.stop()

    second = Catcher("127.0.0.1", 0, tmp_path, keep=2)
    await second.start()
    assert [caught.subject for caught in second.list()] == ["kept"]
    assert not (tmp_path / half_written).exists()
    assert (tmp_path / "other.tmp").exists()
    await deliver(second, b"Subject: new\r\n\r\nx")
    await deliver(second, b"Subject: newer\r\n\r\nx")
    assert [caught.subject for caught in second.list()] == ["newer", "new"]
    await second.stop()


async def test_mails_with_an_unknown_charset_or_without_text_are_shown(catcher: Catcher) -> None:
    await deliver(
        catcher,
        b"Content-Type: text/html; charset=no-such\r\n\r\n<p>\xe9</p>",
        (RECIPIENT, "bob@example.org"),
    )
    await deliver(catcher, b"Content-Type: image/png\r\n\r\n\x89PNG")
    picture, page = (catcher.get(mail.id) for mail in catcher.list())
    assert page is not None
    assert picture is not None
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
async def test_an_id_that_the_catcher_did_not_give_finds_no_mail(
    catcher: Catcher, tmp_path: Path, unknown: str
) -> None:
    (tmp_path / "secret.eml").write_bytes(b"X-Envelope: {}\r\n")
    (tmp_path / "mail" / "stray.eml").write_bytes(b"not ours")
    assert catcher.get(unknown) is None
    assert not catcher.delete(unknown)
    assert (tmp_path / "secret.eml").exists()
    assert list(catcher.list()) == []


@pytest.mark.parametrize("call", ["fsync", "rename", "open"])
async def test_a_mail_that_cannot_be_stored_is_deferred(
    catcher: Catcher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """No partial file is left, because the disk may be full. The log names the cause."""

    def refuse(*_: object, **__: object) -> NoReturn:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, refuse)
    with capture_logs() as lines, pytest.raises(smtplib.SMTPDataError) as deferral:
        await deliver(catcher, b"Subject: lost\r\n\r\nx")
    assert deferral.value.smtp_code == 452
    assert files(tmp_path / "mail") == []
    (line,) = lines
    assert line["event"] == "mail not caught"
    assert "No space left on device" in line["error"]


async def test_a_removed_directory_is_created_again(catcher: Catcher, tmp_path: Path) -> None:
    await deliver(catcher, b"Subject: removed\r\n\r\nx")
    shutil.rmtree(tmp_path / "mail")
    assert list(catcher.list()) == []
    for number in range(4):  # one more than the catcher keeps
        await deliver(catcher, b"Subject: %d\r\n\r\nx" % number)
    assert [mail.subject for mail in catcher.list()] == ["3", "2", "1"]


async def test_only_the_services_user_can_read_the_mails(tmp_path: Path) -> None:
    catcher = Catcher("127.0.0.1", 0, tmp_path / "var" / "mail")
    await catcher.start()
    await deliver(catcher, b"Subject: secret\r\n\r\nx")
    await catcher.stop()
    (mail,) = (tmp_path / "var" / "mail").iterdir()
    assert stat.S_IMODE(mail.stat().st_mode) == 0o600
    assert stat.S_IMODE(mail.parent.stat().st_mode) == 0o700


async def test_an_old_mail_that_cannot_be_removed_does_not_block_new_mail(
    catcher: Catcher, tmp_path: Path
) -> None:
    for number in range(3):
        await deliver(catcher, b"Subject: %d\r\n\r\nx" % number)
    oldest = tmp_path / "mail" / f"{catcher.list()[-1].id}.eml"
    oldest.unlink()
    oldest.mkdir()
    await deliver(catcher, b"Subject: new\r\n\r\nx")
    assert catcher.list()[0].subject == "new"


async def test_a_mail_that_is_removed_while_the_list_is_read_is_left_out(
    catcher: Catcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    await deliver(catcher, b"Subject: here\r\n\r\nx")
    ids = ["1735815845000000000-0123abcd", catcher.list()[0].id]
    monkeypatch.setattr(catcher, "_stored_ids", lambda: ids)
    assert [mail.subject for mail in catcher.list()] == ["here"]


async def test_the_list_is_searched_and_has_pages(catcher: Catcher) -> None:
    for subject in (b"One two", b"TWO", b"three"):
        await deliver(catcher, b"Subject: %b\r\n\r\nx" % subject)
    newest, middle, oldest = catcher.list()
    assert catcher.list(["two"]) == [middle, oldest]
    assert catcher.list(["two", SENDER]) == [middle, oldest]
    assert catcher.list(["two", "one"], limit=1) == [oldest]
    assert catcher.list(["two"], after=middle.id) == [oldest]
    assert catcher.list(after=newest.id, limit=1) == [middle]
    assert catcher.list(after="1735815845000000000-0123abcd") == []
    assert catcher.count() == 3


@pytest.mark.thorough
def test_a_search_keeps_only_what_it_returns_in_memory(tmp_path: Path) -> None:
    """The heads of these 300 mails have 9 MB.

    A process of its own searches them, because other threads of the tests need memory, too.
    """
    head = b"Subject: one\r\n" + b"X: %b\r\n" % (b"x" * 900) * 30
    for number in range(300):
        name = f"{1735815845000000000 + number}-0123abcd.eml"
        (tmp_path / name).write_bytes(b"X-Envelope: {}\r\n" + head + b"\r\nx")
    searched = subprocess.run(
        [sys.executable, "-c", SEARCH, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert int(searched.stdout) < 1_000_000


async def test_a_mail_is_found_by_its_message_id(catcher: Catcher) -> None:
    for subject in (b"older", b"newer"):
        await deliver(catcher, b"Message-ID: <7f3a@x>\r\nSubject: %b\r\n\r\nx" % subject)
    await deliver(catcher, b"Message-ID: <>\r\nSubject: none\r\n\r\nx")
    newer = catcher.list()[1].id
    assert [catcher.find(name) for name in ("<7f3a@x>", "7f3a@x")] == [newer, newer]
    assert [catcher.find(name) for name in ("", "<>", "7f3a", "7F3A@x")] == [None] * 4


async def test_a_deleted_mail_does_not_count_among_those_that_are_kept(catcher: Catcher) -> None:
    for number in range(3):
        await deliver(catcher, b"Subject: %d\r\n\r\nx" % number)
    assert catcher.delete(catcher.list()[0].id)
    await deliver(catcher, b"Subject: new\r\n\r\nx")
    assert [mail.subject for mail in catcher.list()] == ["new", "1", "0"]


async def test_all_mails_are_deleted_or_those_up_to_one(catcher: Catcher, tmp_path: Path) -> None:
    for number in range(3):
        await deliver(catcher, b"Subject: %d\r\n\r\nx" % number)
    catcher.delete_all("")
    assert catcher.count() == 3
    catcher.delete_all(catcher.list()[1].id)
    assert [mail.subject for mail in catcher.list()] == ["2"]
    # Another program wrote this one.
    (tmp_path / "mail" / "1735815845000000000-0123abcd.eml").write_bytes(b"Subject: x\r\n\r\nx")
    catcher.delete_all()
    assert catcher.count() == 0


async def test_an_attachment_is_read(catcher: Catcher) -> None:
    await deliver(catcher, b"Content-Type: a/b\r\nContent-Transfer-Encoding: base64\r\n\r\naGk=")
    caught = catcher.get(catcher.list()[0].id)
    assert caught is not None
    assert b"".join(catcher.read_attachment(caught.id, caught.attached[0])) == b"hi"
    catcher.delete(caught.id)
    with pytest.raises(FileNotFoundError):
        next(catcher.read_attachment(caught.id, caught.attached[0]))


# Addresses that fail on purpose


async def test_a_recipient_that_asks_for_it_is_refused(catcher: Catcher) -> None:
    def client() -> None:
        with smtplib.SMTP("127.0.0.1", catcher.port, timeout=PATIENCE) as smtp:
            smtp.sendmail(SENDER, [RECIPIENT, "refuse+550@example.com"], b"Subject: x\r\n\r\nx")
            with pytest.raises(smtplib.SMTPRecipientsRefused) as refused:
                smtp.sendmail(SENDER, ["refuse+552@example.com"], b"Subject: y\r\n\r\nx")
            assert refused.value.recipients["refuse+552@example.com"][0] == 552

    await asyncio.to_thread(client)
    (mail,) = catcher.list()
    assert (mail.subject, mail.recipients) == ("x", (RECIPIENT,))


async def test_a_mail_that_asks_for_it_is_deferred_twice(catcher: Catcher) -> None:
    for _ in range(2):
        with pytest.raises(smtplib.SMTPDataError) as deferred:
            await deliver(catcher, b"Message-ID: <7f3a@x>\r\n\r\nx", ("defer+451@example.com",))
        assert deferred.value.smtp_code == 451
    assert catcher.count() == 0
    await deliver(catcher, b"Message-ID: <7f3a@x>\r\n\r\nx", ("defer+451@example.com",))
    assert catcher.count() == 1


async def test_a_mail_that_asks_for_it_is_accepted_late(
    catcher: Catcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fault_addresses, "LONGEST_DELAY", 0.2)
    began = time.monotonic()
    delivery = asyncio.create_task(deliver(catcher, b"\r\nx", ("slow+3@example.com",)))
    await deliver(catcher, b"\r\nx")  # another mail does not wait
    await delivery
    assert time.monotonic() - began >= 0.2
    assert catcher.count() == 2


async def test_the_catcher_offers_8bitmime_smtputf8_and_its_size_limit(catcher: Catcher) -> None:
    """SIZE is RFC 1870, 8BITMIME is RFC 6152, SMTPUTF8 is RFC 6531."""

    def client() -> tuple[int, int, int]:
        with smtplib.SMTP("127.0.0.1", catcher.port, timeout=PATIENCE) as smtp:
            smtp.ehlo()
            assert {"8bitmime", "smtputf8", "size"} <= smtp.esmtp_features.keys()
            size_limit = int(smtp.esmtp_features["size"])
            too_large, _ = smtp.mail(SENDER, [f"SIZE={size_limit + 1}"])
            smtp.mail("jörg@example.com", ["SMTPUTF8", "BODY=8BITMIME"])
            replies = [smtp.rcpt(f"{n}@example.com")[0] for n in range(MAX_RECIPIENTS + 1)]
            assert set(replies[:-1]) == {250}
            return too_large, replies[-1], smtp.data("Subject: été\r\n\r\nx".encode())[0]

    assert await asyncio.to_thread(client) == (552, 452, 250)
    (mail,) = catcher.list()
    assert (mail.sender, mail.subject) == ("jörg@example.com", "été")
    assert len(mail.recipients) == MAX_RECIPIENTS


async def test_the_error_for_a_port_in_use_names_the_port(catcher: Catcher, tmp_path: Path) -> None:
    with pytest.raises(OSError, match=re.escape(f"127.0.0.1:{catcher.port}")):
        await Catcher("127.0.0.1", catcher.port, tmp_path).start()


async def test_the_catcher_listens_on_each_address_of_its_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`localhost` may resolve to two addresses, and a client may choose either."""
    two = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (f"127.0.0.{n}", 0)) for n in (1, 2)]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: two)
    catcher = Catcher("localhost", 0, tmp_path)
    await catcher.start()
    for _, _, _, _, (address, _) in two:
        reader, writer = await asyncio.open_connection(address, catcher.port)
        assert (await reader.readline()).startswith(b"220 ")
        writer.close()
    await catcher.stop()


async def test_stop_closes_open_connections(catcher: Catcher) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", catcher.port)
    assert (await reader.readline()).startswith(b"220 ")
    await catcher.stop()
    assert await reader.read() == b""
    writer.close()
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", catcher.port)) != 0


async def test_the_catcher_can_be_stopped_without_a_start(tmp_path: Path) -> None:
    catcher = Catcher("127.0.0.1", 2525, tmp_path)
    assert catcher.port == 2525
    await catcher.stop()
