"""What each failure means for the mail."""

import ssl

import pytest
from aiosmtplib import (
    SMTPAuthenticationError,
    SMTPConnectError,
    SMTPConnectResponseError,
    SMTPDataError,
    SMTPException,
    SMTPHeloError,
    SMTPReadTimeoutError,
    SMTPRecipientRefused,
    SMTPRecipientsRefused,
    SMTPResponseException,
    SMTPSenderRefused,
    SMTPServerDisconnected,
)

from app.mail.replies import MailDeferred, MailError, MailRefused, classify, one_line


def with_code(code: int) -> list[Exception]:
    return [
        SMTPConnectResponseError(code, "no"),
        SMTPHeloError(code, "no"),
        SMTPSenderRefused(code, "no", "notifications@example.com"),
        SMTPRecipientRefused(code, "no", "ada@example.org"),
        SMTPRecipientsRefused([SMTPRecipientRefused(code, "no", "ada@example.org")]),
        SMTPDataError(code, "no"),
    ]


@pytest.mark.parametrize("error", [e for code in (421, 450, 451, 452) for e in with_code(code)])
def test_4xx_is_temporary_wherever_it_is_said(error: Exception) -> None:
    outcome = classify(error)
    assert isinstance(outcome, MailDeferred)
    assert outcome.detail == f"{outcome.smtp_code} no"
    assert outcome.smtp_code in {421, 450, 451, 452}


@pytest.mark.parametrize("error", [e for code in (550, 552, 554) for e in with_code(code)])
def test_5xx_is_permanent_wherever_it_is_said(error: Exception) -> None:
    outcome = classify(error)
    assert isinstance(outcome, MailRefused)
    assert outcome.detail == f"{outcome.smtp_code} no"
    assert outcome.smtp_code in {550, 552, 554}


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
        (SMTPRecipientsRefused([]), "[]"),
        (KeyError("secret"), "Sending failed: KeyError"),
    ],
)
def test_trouble_on_the_way_is_temporary_and_has_no_code(error: Exception, detail: str) -> None:
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


@pytest.mark.parametrize("code", [530, 534, 535, 538])
def test_a_missing_login_is_temporary(code: int) -> None:
    outcome = classify(SMTPSenderRefused(code, "Authentication required", "a@example.com"))
    assert isinstance(outcome, MailDeferred)
    assert outcome.smtp_code == code


def test_a_refused_starttls_is_temporary() -> None:
    """It is no SMTPDataError or the like, but the plain one."""
    outcome = classify(SMTPResponseException(502, "5.5.1 No"))
    assert isinstance(outcome, MailDeferred)
    assert (outcome.detail, outcome.smtp_code) == ("502 5.5.1 No", 502)


@pytest.mark.parametrize("code", [-1, 0, 199, 252, 354, 600])
def test_an_answer_that_makes_no_sense_is_temporary(code: int) -> None:
    outcome = classify(SMTPResponseException(code, "Malformed: AGFkYQBzZWNyZXQ="))
    assert isinstance(outcome, MailDeferred)
    assert (outcome.detail, outcome.smtp_code) == ("The SMTP server's answer made no sense", None)


def test_what_cannot_be_put_on_the_wire_is_permanent() -> None:
    outcome = classify(ValueError("Address 'a b' contains …"))
    assert isinstance(outcome, MailRefused)
    assert "a b" not in outcome.detail


def test_the_detail_is_one_short_printable_line() -> None:
    outcome = classify(SMTPDataError(554, "no\nreally\x1b[31m \udcff" + "x" * 1000))
    assert outcome.detail.startswith("554 no really [31m xxx")
    assert outcome.detail.isprintable()
    assert len(outcome.detail) == 500
    assert str(outcome) == outcome.detail


def test_one_line_keeps_a_multiline_reply_together() -> None:
    assert one_line("250 2.0.0 Ok\nqueued as\t7F3A") == "250 2.0.0 Ok queued as 7F3A"


def test_temporary_and_permanent_are_both_mail_errors() -> None:
    assert issubclass(MailDeferred, MailError)
    assert issubclass(MailRefused, MailError)
