"""Decide whether an SMTP failure is temporary or permanent: try the mail again, or give up."""

import re
from enum import Enum

from aiosmtplib import SMTPAuthenticationError, SMTPException, SMTPResponseException

DETAIL_LENGTH = 500


class MailError(Exception):
    """The server did not take a mail.

    `detail` is one line. `smtp_code` is the code of the server's reply, or None without one.
    """

    def __init__(self, detail: str, smtp_code: int | None = None) -> None:
        super().__init__(detail)
        self.detail = detail
        self.smtp_code = smtp_code


class MailDeferred(MailError):
    """Temporary: the server may take the same mail later."""


class ServerUnavailable(MailDeferred):
    """No mail can be sent now, because no connection to the server could be opened.

    A connection is open once the server's greeting has come, and the server has accepted EHLO,
    STARTTLS and the login.
    """


class MailRefused(MailError):
    """Permanent: the server would refuse the same mail again."""


class Scope(Enum):
    """The mails that a 5xx reply to MAIL, RCPT, DATA or the content concerns."""

    THIS_MAIL = "the reply is about the mail or its recipient"
    EVERY_MAIL = "the reply is about this service, its configuration, or the server itself"


def classify(error: OSError | SMTPException) -> MailError:
    """Return MailRefused or MailDeferred for an error on an open connection.

    - A 4xx reply is temporary (RFC 5321, 4.2.1).
    - A 5xx reply is permanent if it concerns this mail alone. It is temporary if it concerns every
      mail, because then the operator has to change something, and the mail can go out afterwards.
    - Everything else is temporary: a time-out, even after the final dot (RFC 1047), a lost
      connection, a line that is not a reply. The server may have taken the mail, and then a retry
      makes a copy. The recipient can tell a copy by its Message-ID, but cannot tell a lost mail.
    """
    detail, code = describe(error)
    if (
        isinstance(error, SMTPResponseException)
        and error.code // 100 == 5  # noqa: PLR2004 -- RFC 5321, 4.2.1
        and scope_of(error.code, error.message) is Scope.THIS_MAIL
    ):
        return MailRefused(detail, code)
    return MailDeferred(detail, code)


def describe(error: Exception) -> tuple[str, int | None]:
    """Return an error as one printable line, and the code of the server's reply or None."""
    match error:
        # The text of this reply may repeat the password, so only its codes are shown.
        case SMTPAuthenticationError():
            return f"The SMTP server refused our login: {_status(error)}", error.code
        case SMTPResponseException() if error.code // 100 in {4, 5}:
            return one_line(f"{error.code} {error.message}"), error.code
        # The server does not speak SMTP, or replies with success where that makes no sense. The
        # text may be anything, so it is not shown.
        case SMTPResponseException():
            return "The SMTP server's answer made no sense", None
        case TimeoutError():
            return "The SMTP server did not answer in time", None
        case _:
            return one_line(str(error)), None


# The rules for 5xx replies, in the order in which `scope_of` applies them. If none applies, a reply
# is about this mail: 550, 551, 552, 553, 556 (RFC 7504: the recipient's domain takes no mail), a
# 554 that gives no reason, and unassigned codes.

# 1. The code.
# 500, 502, 503, 504, 555: the server does not understand the command, its order or its parameters
# (RFC 5321, 4.2.2), and the service sends the same commands for every mail. Postfix also replies
# 504 to a HELO name that it does not accept. 501 is not in the list, because after RCPT it is
# mostly about the recipient's address.
# 521: the host accepts no mail at all (RFC 7504).
# 523, 524, 525, 530, 534, 535, 538: the server asks for encryption or a login, or rejects the login
# (RFC 4954, 6; RFC 5248). The operator has to change the settings.
_CODES_ABOUT_EVERY_MAIL = {500, 502, 503, 504, 555, 521, 523, 524, 525, 530, 534, 535, 538}

# 2. The enhanced status code (RFC 3463; the registry of RFC 5248).
# 5.1.7, 5.1.8: the sender's address, which is MAIL_FROM for every mail.
# 5.3.2, 5.3.3, 5.3.5: the system accepts no mail, lacks a feature, or is wrongly configured.
# 5.7.8 to 5.7.14: logins and encryption.
# 5.7.20 to 5.7.27: DKIM, SPF, DMARC, reverse DNS and a null MX of the sender (RFC 7372, RFC 7505).
# The operator has to change the DNS or the signing.
_STATUS_ABOUT_EVERY_MAIL = re.compile(r"5\.(1\.[78]|3\.[235]|7\.([89]|1[0-4]|2[0-7]))\b")
# 3. 5.5.x, "protocol status", together with 501 or 554, as in `501 5.5.2 <name>: Helo command
# rejected: Invalid name` and `554 5.5.1 Error`. Together with 550 to 553 it does not count, because
# some servers reply `550 5.5.0 mailbox unavailable`.
_PROTOCOL_STATUS = re.compile(r"5\.5\.\d+\b")
_CODES_WITH_PROTOCOL_STATUS = {501, 554}

# 4. The text. 5.7.1 means "not authorized" for any reason, and only the text gives the reason.
# Postfix, and most servers that copied its texts, name the restriction; by default Postfix applies
# all restrictions at RCPT. "Relay access denied" means that the server does not accept this client:
# it has not logged in, or it is in another network.
_TEXT_ABOUT_EVERY_MAIL = re.compile(
    r"(client host|helo command|sender address) (rejected|blocked)|client host \S+ blocked|"
    r"relay access denied|relaying denied|relay not permitted|unable to relay",
    re.IGNORECASE,
)


def scope_of(code: int, message: str) -> Scope:
    """Return whether a 5xx reply concerns one mail or every mail.

    For example, `550 5.1.1 User unknown` concerns one mail, and `550 5.7.1 Unable to relay` every
    mail.
    """
    is_about_every_mail = (
        code in _CODES_ABOUT_EVERY_MAIL
        or _STATUS_ABOUT_EVERY_MAIL.match(message)
        or (code in _CODES_WITH_PROTOCOL_STATUS and _PROTOCOL_STATUS.match(message))
        or _TEXT_ABOUT_EVERY_MAIL.search(message)
    )
    return Scope.EVERY_MAIL if is_about_every_mail else Scope.THIS_MAIL


def _status(reply: SMTPResponseException) -> str:
    """Return the codes of a reply without its text, such as `535 5.7.8`."""
    enhanced = re.match(r"[245]\.\d{1,3}\.\d{1,3}\b", reply.message)  # RFC 3463
    return f"{reply.code} {enhanced[0]}" if enhanced else str(reply.code)


def one_line(text: str) -> str:
    """Return a server's text as one printable line of at most 500 characters."""
    printable = "".join(character if character.isprintable() else " " for character in text)
    return " ".join(printable.split())[:DETAIL_LENGTH]
