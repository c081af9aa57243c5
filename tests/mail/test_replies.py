"""The classification of SMTP failures: temporary, permanent, or an outage of the server."""

import ssl

import pytest
from aiosmtplib import (
    SMTPAuthenticationError,
    SMTPConnectError,
    SMTPDataError,
    SMTPException,
    SMTPReadTimeoutError,
    SMTPResponseException,
    SMTPServerDisconnected,
)

from app.mail.connection import UnexpectedReply
from app.mail.replies import (
    MailDeferred,
    MailError,
    MailRefused,
    ServerUnavailable,
    classify,
    one_line,
)


@pytest.mark.parametrize("code", [421, 432, 450, 451, 452, 454, 455, 458, 499])
def test_4xx_is_temporary(code: int) -> None:
    """This includes unlisted codes, because the first digit decides."""
    outcome = classify(UnexpectedReply(code, "no"))
    assert isinstance(outcome, MailDeferred)
    assert (outcome.detail, outcome.smtp_code) == (f"{code} no", code)


@pytest.mark.parametrize(
    "reply",
    [
        "550 no",
        "550 5.1.1 <nobody@example.org>: Recipient address rejected: User unknown",
        "550 5.5.0 Requested action not taken: mailbox unavailable",
        "550 5.7.1 Message contains spam or virus",
        "551 User not local; please try <ada@example.net>",
        "552 5.3.4 Message size exceeds fixed limit",
        "552 5.2.2 Mailbox full",
        "553 5.1.3 The recipient address is not valid",
        "554 5.7.1 Message blocked by our policy on content",
        "554 5.6.0 Malformed mail",
        "554 Transaction failed",
        "556 5.1.10 Recipient address has null MX",
        "501 5.1.3 Bad recipient address syntax",
        "501 Syntax error in address",
        "559 never heard of",
        "599 never heard of",
    ],
)
def test_5xx_about_the_mail_or_its_recipient_is_permanent(reply: str) -> None:
    """This includes unlisted codes."""
    outcome = classify(UnexpectedReply(int(reply[:3]), reply[4:]))
    assert isinstance(outcome, MailRefused)
    assert (outcome.detail, outcome.smtp_code) == (reply, int(reply[:3]))


@pytest.mark.parametrize(
    "reply",
    [
        "500 5.5.2 Error: command not recognized",
        "501 5.5.2 <a_b>: Helo command rejected: Invalid name",
        "501 5.5.4 Syntax: MAIL FROM:<address>",
        "502 5.5.2 Error: command not recognized",
        "503 5.5.1 Error: send HELO/EHLO first",
        "504 5.5.2 <web1>: Helo command rejected: need fully-qualified hostname",
        "554 5.5.1 Error: bad sequence of commands",
        "555 5.5.4 Unsupported option",
        "521 5.3.2 This host accepts no mail",
        "554 5.3.2 The system does not accept network messages",
        "554 5.3.5 System incorrectly configured",
        "530 5.7.0 Must issue a STARTTLS command first",
        "534 5.7.9 Authentication mechanism is too weak",
        "535 5.7.8 Authentication credentials invalid",
        "538 5.7.11 Encryption required",
        "550 5.7.13 User account disabled",
        "550 5.7.25 Reverse DNS validation failed",
        "550 5.7.26 This mail is unauthenticated",
        "550 5.1.8 Domain of sender address does not exist",
        "553 5.7.1 <notifications@example.com>: Sender address rejected: not owned by user ada",
        "550 5.7.1 <web1>: Helo command rejected: Access denied",
        "554 5.7.1 <client.example.com[192.0.2.1]>: Client host rejected: Access denied",
        "554 5.7.1 Service unavailable; Client host [192.0.2.1] blocked using dnsbl.example",
        "554 5.7.1 <ada@example.org>: Relay access denied",
        "550 5.7.1 Unable to relay",
        "550 relay not permitted",
    ],
)
def test_5xx_about_the_client_or_its_setup_is_temporary(reply: str) -> None:
    """Every mail would get the same reply until the operator corrects the setup."""
    outcome = classify(UnexpectedReply(int(reply[:3]), reply[4:]))
    assert isinstance(outcome, MailDeferred)
    assert (outcome.detail, outcome.smtp_code) == (reply, int(reply[:3]))


@pytest.mark.parametrize(
    ("error", "detail"),
    [
        (SMTPReadTimeoutError("Timed out"), "The SMTP server did not answer in time"),
        (TimeoutError(), "The SMTP server did not answer in time"),
        (SMTPConnectError("Error connecting to mail"), "Error connecting to mail"),
        (SMTPServerDisconnected("Connection lost"), "Connection lost"),
        (ConnectionResetError("reset"), "reset"),
        (ssl.SSLCertVerificationError(1, "bad certificate"), "bad certificate"),
        (SMTPException("STARTTLS is not supported"), "STARTTLS is not supported"),
    ],
)
def test_a_failure_of_the_connection_is_temporary_and_has_no_code(
    error: OSError | SMTPException, detail: str
) -> None:
    outcome = classify(error)
    assert isinstance(outcome, MailDeferred)
    assert (outcome.detail, outcome.smtp_code) == (detail, None)


@pytest.mark.parametrize(
    ("text", "detail"),
    [
        ("5.7.8 wrong: AGFkYQBzZWNyZXQ=", "The SMTP server refused our login: 535 5.7.8"),
        ("wrong: AGFkYQBzZWNyZXQ=", "The SMTP server refused our login: 535"),
    ],
)
def test_a_refused_login_is_temporary_and_its_reply_is_not_repeated(text: str, detail: str) -> None:
    outcome = classify(SMTPAuthenticationError(535, text))
    assert isinstance(outcome, MailDeferred)
    assert (outcome.detail, outcome.smtp_code) == (detail, 535)


@pytest.mark.parametrize("code", [-1, 0, 199, 252, 354, 600])
def test_an_invalid_reply_is_temporary(code: int) -> None:
    outcome = classify(SMTPResponseException(code, "Malformed: AGFkYQBzZWNyZXQ="))
    assert isinstance(outcome, MailDeferred)
    assert (outcome.detail, outcome.smtp_code) == ("The SMTP server's answer made no sense", None)


def test_the_detail_is_a_single_short_printable_line() -> None:
    outcome = classify(SMTPDataError(554, "no\nreally\x1b[31m \udcff" + "x" * 1000))
    assert outcome.detail.startswith("554 no really [31m xxx")
    assert outcome.detail.isprintable()
    assert len(outcome.detail) == 500
    assert str(outcome) == outcome.detail


def test_one_line_joins_the_lines_of_a_reply() -> None:
    assert one_line("250 2.0.0 Ok\nqueued as\t7F3A") == "250 2.0.0 Ok queued as 7F3A"


def test_temporary_and_permanent_are_both_mail_errors() -> None:
    assert issubclass(MailDeferred, MailError)
    assert issubclass(ServerUnavailable, MailDeferred)
    assert issubclass(MailRefused, MailError)
