"""Say what an SMTP failure means: the mail may be tried again, or never will be taken."""

import re
from enum import Enum

from aiosmtplib import SMTPAuthenticationError, SMTPException, SMTPResponseException

DETAIL_LENGTH = 500


class MailError(Exception):
    """The server did not take a mail; `detail` is one line, `smtp_code` its reply's, if any."""

    def __init__(self, detail: str, smtp_code: int | None = None) -> None:
        super().__init__(detail)
        self.detail = detail
        self.smtp_code = smtp_code


class MailDeferred(MailError):
    """Not now: the same mail may be taken later."""


class ServerUnavailable(MailDeferred):
    """No mail can be sent now: no connection to the server could be opened.

    A connection is open when the server has been found, has greeted us, and has accepted EHLO,
    STARTTLS and the login.
    """


class MailRefused(MailError):
    """Never: the same mail would be refused again."""


class About(Enum):
    """The subject of a 5xx reply to MAIL, RCPT, DATA or the content."""

    MAIL = "the mail, or its recipient"
    US = "this client, its configuration, or the server: any mail would meet the same reply"


def classify(error: OSError | SMTPException) -> MailError:
    """Say what an error means that came after the connection was open.

    Replies of 4xx are temporary (RFC 5321, 4.2.1). Replies of 5xx are permanent if they are about
    the mail, and temporary if they are about us. Everything else is temporary: silence, even after
    the final dot (RFC 1047), a lost connection, an answer that is no reply. A second copy can be
    told by its Message-ID; a lost mail by nothing.
    """
    detail, code = describe(error)
    if (
        isinstance(error, SMTPResponseException)
        and error.code // 100 == 5  # noqa: PLR2004 -- RFC 5321, 4.2.1
        and about(error.code, error.message) is About.MAIL
    ):
        return MailRefused(detail, code)
    return MailDeferred(detail, code)


def describe(error: Exception) -> tuple[str, int | None]:
    """Give an error as one printable line, and the code of the reply if it is one."""
    match error:
        # The server's words may quote what it was sent.
        case SMTPAuthenticationError():
            return f"The SMTP server refused our login: {_status(error)}", error.code
        case SMTPResponseException() if error.code // 100 in {4, 5}:
            return one_line(f"{error.code} {error.message}"), error.code
        # Not SMTP, or success where there can be none. The words may be anything.
        case SMTPResponseException():
            return "The SMTP server's answer made no sense", None
        case TimeoutError():
            return "The SMTP server did not answer in time", None
        case _:
            return one_line(str(error)), None


# The decisions about 5xx replies, in the order in which they are asked. Where this list is silent,
# a reply is about the mail: 550, 551, 552, 553, 556 (RFC 7504: the recipient's domain takes no
# mail), 554 with no more said, and codes that nobody has assigned.

# 500, 502, 503, 504, 555: the command, its order or its parameters are not understood (RFC 5321,
# 4.2.2). We say the same commands for every mail. 504 is also Postfix's answer to a HELO name that
# it does not like. Not 501: at RCPT it is mostly said about the recipient's address.
# 521: the host accepts no mail at all (RFC 7504). 523, 524, 525, 530, 534, 535, 538: encryption or
# a login is needed, or the login is not accepted (RFC 4954, 6; RFC 5248): the operator mends that.
_CODES_ABOUT_US = {500, 502, 503, 504, 555, 521, 523, 524, 525, 530, 534, 535, 538}

# Enhanced status codes (RFC 3463; RFC 5248's registry).
# 5.1.7, 5.1.8: the sender's address, which is MAIL_FROM for every mail.
# 5.3.2, 5.3.3, 5.3.5: the system accepts no mail, lacks a feature, or is wrongly configured.
# 5.7.8 to 5.7.14: logins and encryption. 5.7.20 to 5.7.27: DKIM, SPF, DMARC, reverse DNS and a null
# MX of the sender (RFC 7372, RFC 7505): the operator's DNS or signing.
_STATUS_ABOUT_US = re.compile(r"5\.(1\.[78]|3\.[235]|7\.([89]|1[0-4]|2[0-7]))\b")
# 5.5.x, "protocol status", is about us beside 501 and 554, as in `501 5.5.2 <name>: Helo command
# rejected: Invalid name` and `554 5.5.1 Error`. Beside 550 to 553 the code wins: some servers say
# `550 5.5.0 mailbox unavailable`.
_PROTOCOL_STATUS = re.compile(r"5\.5\.\d+\b")
_CODES_WITH_PROTOCOL_STATUS = {501, 554}

# 5.7.1 says "not authorized" about anything; its words tell. Postfix (and most who copied its
# words) names the restriction that was applied, RCPT being where it applies them all. Relaying that
# is denied means that the server does not know us: no login, or not from this network.
_WORDS_ABOUT_US = re.compile(
    r"(client host|helo command|sender address) (rejected|blocked)|client host \S+ blocked|"
    r"relay access denied|relaying denied|relay not permitted|unable to relay",
    re.IGNORECASE,
)


def about(code: int, message: str) -> About:
    """Tell what a 5xx reply is about."""
    is_about_us = (
        code in _CODES_ABOUT_US
        or _STATUS_ABOUT_US.match(message)
        or (code in _CODES_WITH_PROTOCOL_STATUS and _PROTOCOL_STATUS.match(message))
        or _WORDS_ABOUT_US.search(message)
    )
    return About.US if is_about_us else About.MAIL


def _status(reply: SMTPResponseException) -> str:
    enhanced = re.match(r"[245]\.\d{1,3}\.\d{1,3}\b", reply.message)  # RFC 3463
    return f"{reply.code} {enhanced[0]}" if enhanced else str(reply.code)


def one_line(text: str) -> str:
    """Return a server's text as one printable line of at most 500 characters."""
    printable = "".join(character if character.isprintable() else " " for character in text)
    return " ".join(printable.split())[:DETAIL_LENGTH]
