"""Addresses for which the catcher fails on purpose."""

from hashlib import sha256

import pytest

from app.mail.fault_addresses import MOST_REMEMBERED, Deferrals, delay, refusal
from app.mail.replies import Scope, scope_of

MAIL = b"Message-ID: <7f3a@example.com>\r\n\r\nhi"
DEFER = "defer+451@example.com"


@pytest.mark.parametrize(
    ("address", "code"),
    [
        ("refuse+550@example.com", "550"),
        ("Refuse+500@EXAMPLE.com", "500"),
        ("REFUSE+559@example.org", "559"),
    ],
)
def test_an_address_asks_for_a_refusal_with_any_code_from_500_to_559(
    address: str, code: str
) -> None:
    reply = refusal(address)
    assert reply is not None
    assert reply.startswith(f"{code} 5.0.0 This address asks")


@pytest.mark.parametrize(
    "address",
    [
        "refuse+999@example.com",
        "refuse+450@example.com",
        "refuse+560@example.com",
        "refuse+5500@example.com",
        "refuse+55@example.com",
        "refuse+@example.com",
        "refuse@example.com",
        "refuse+550",
        "refuse+550x@example.com",
        "xrefuse+550@example.com",
        "refuse+\N{ARABIC-INDIC DIGIT FIVE}50@example.com",
        "ada@refuse+550.example.com",
        "defer+451@example.com",
    ],
)
def test_a_form_that_is_not_known_is_an_ordinary_address(address: str) -> None:
    assert refusal(address) is None
    assert delay([address]) == 0
    if address != DEFER:
        assert Deferrals().deferral([address], MAIL) is None


def test_a_refusal_with_550_is_about_this_mail_and_makes_its_task_fail() -> None:
    for code in (550, 551, 552, 553, 554):
        reply = refusal(f"refuse+{code}@example.com")
        assert reply is not None
        assert scope_of(code, reply.partition(" ")[2]) is Scope.THIS_MAIL


@pytest.mark.parametrize(
    ("recipients", "seconds"),
    [
        ([], 0),
        (["slow+3@example.com"], 3),
        (["SLOW+03@example.com", "ada@example.com", "slow+2@example.com"], 3),
        (["slow+30@example.com"], 30),
        (["slow+999999999@example.com"], 30),
        (["slow+9999999999@example.com"], 0),
        (["slow+0@example.com"], 0),
        (["slow+-1@example.com"], 0),
        (["slow+1.5@example.com"], 0),
    ],
)
def test_the_longest_delay_counts_up_to_30_seconds(recipients: list[str], seconds: float) -> None:
    assert delay(recipients) == seconds


def attempts(deferrals: Deferrals, mail: bytes, *recipients: str, number: int = 3) -> list[str]:
    """Return the codes of the first attempts of a mail; "" is an accepted one."""
    replies = [deferrals.deferral(recipients or [DEFER], mail) for _ in range(number)]
    return [(reply or "").partition(" ")[0] for reply in replies]


def test_the_first_two_attempts_of_each_mail_are_deferred() -> None:
    deferrals = Deferrals()
    assert attempts(deferrals, MAIL) == ["451", "451", ""]
    assert attempts(deferrals, MAIL.replace(b"7f3a", b"8000")) == ["451", "451", ""]


def test_a_reply_says_that_the_address_asked_for_it() -> None:
    reply = Deferrals().deferral(["ada@example.com", "Defer+421@example.com"], MAIL)
    assert reply == (
        "421 4.0.0 This address asks the catcher to defer its mail: "
        "attempt 1 of 2 that are deferred"
    )


def test_a_mail_is_known_by_its_message_id_and_recipient_and_without_one_by_its_content() -> None:
    deferrals = Deferrals()
    assert attempts(deferrals, MAIL, number=1) == ["451"]
    assert attempts(
        deferrals, b"Received: again\r\n" + MAIL, "DEFER+451@example.com", number=2
    ) == [
        "451",
        "",
    ]
    assert attempts(deferrals, MAIL, "defer+451@example.org") == ["451", "451", ""]
    assert attempts(deferrals, b"\r\nhi", number=2) == ["451", "451"]
    assert attempts(deferrals, b"\r\nho", "defer+450@\udce9.org") == ["450", "450", ""]
    assert attempts(deferrals, b"\r\nhi", number=1) == [""]


def test_a_mail_to_several_such_addresses_is_deferred_twice_and_not_twice_for_each() -> None:
    deferrals = Deferrals()
    several = DEFER, "ada@example.com", "defer+452@example.org", DEFER
    for _ in range(2):
        assert attempts(deferrals, MAIL, *several, number=3) == ["451", "451", ""]


def test_a_mail_whose_recipients_have_different_counts_is_accepted_as_well() -> None:
    deferrals = Deferrals()
    assert attempts(deferrals, MAIL, number=1) == ["451"]
    assert attempts(deferrals, MAIL, DEFER, "defer+452@example.org") == ["451", "452", ""]


def test_an_accepted_mail_is_forgotten() -> None:
    deferrals = Deferrals()
    for _ in range(2):
        assert attempts(deferrals, MAIL) == ["451", "451", ""]


def test_the_oldest_mail_is_forgotten_if_there_are_too_many() -> None:
    deferrals = Deferrals()
    attempts(deferrals, MAIL, number=2)
    for number in range(MOST_REMEMBERED):
        attempts(deferrals, b"\r\n%d" % number, number=1)
    assert attempts(deferrals, MAIL, number=1) == ["451"]


def test_a_large_mail_to_many_recipients_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The catcher does this on the event loop of the API."""
    read: list[int] = []

    def digest(content: bytes) -> bytes:
        read.append(len(content))
        return sha256(content).digest()

    monkeypatch.setattr("app.mail.fault_addresses._digest", digest)
    recipients = [f"defer+451@{number}.example.com" for number in range(100)]
    content = b"no headers" * 100_000
    assert attempts(Deferrals(), content, *recipients) == ["451", "451", ""]
    assert sum(read) < 4 * len(content)  # in three attempts
