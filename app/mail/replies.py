"""Say what an SMTP failure means: the mail may be tried again, or never will be taken."""

import re

from aiosmtplib import (
    SMTPAuthenticationError,
    SMTPException,
    SMTPRecipientsRefused,
    SMTPResponseException,
)

DETAIL_LENGTH = 500


class MailError(Exception):
    """The server did not take a mail; `detail` is one line, `smtp_code` its reply's, if any."""

    def __init__(self, detail: str, smtp_code: int | None = None) -> None:
        super().__init__(detail)
        self.detail = detail
        self.smtp_code = smtp_code


class MailDeferred(MailError):
    """Not now: the same mail may be taken later."""


class MailRefused(MailError):
    """Never: the same mail would be refused again."""


def classify(error: Exception) -> MailError:
    """Turn whatever sending a mail raised into MailDeferred or MailRefused."""
    match error:
        # It has no code of its own; we name one recipient, so the first is the one.
        case SMTPRecipientsRefused(recipients=[refused, *_]):
            return classify(refused)
        case SMTPResponseException():
            return _classify_reply(error)
        # Silence at any step, even after the final dot (RFC 1047): a second copy can be told by
        # its Message-ID, a lost mail by nothing.
        case TimeoutError():
            return MailDeferred("The SMTP server did not answer in time")
        # Refused, reset or lost connections, an unknown host, a bad certificate; and, as a plain
        # SMTPException, a server that does not offer STARTTLS or AUTH.
        case OSError() | SMTPException():
            return MailDeferred(one_line(str(error)))
        # An address or a header that cannot be put on the wire will not be by waiting.
        case ValueError():
            return MailRefused("The mail cannot be put on the wire")
        # A fault of ours: once it is repaired, the mail can still be sent.
        case _:
            return MailDeferred(f"Sending failed: {type(error).__name__}")


def _classify_reply(reply: SMTPResponseException) -> MailError:
    detail = one_line(f"{reply.code} {reply.message}")
    match reply.code // 100:
        # The operator's password is wrong, not the mail; Postfix waits too
        # (smtp_sasl_auth_soft_bounce). The server's words may quote what it was sent.
        case _ if isinstance(reply, SMTPAuthenticationError):
            return MailDeferred(f"The SMTP server refused our login: {_status(reply)}", reply.code)
        # 421, 450, 451, 452 and the like: "transient" (RFC 5321, 4.2.1).
        case 4:
            return MailDeferred(detail, reply.code)
        # Login needed, or of another kind: about us again (RFC 4954, 6).
        case 5 if reply.code in {530, 534, 535, 538}:
            return MailDeferred(detail, reply.code)
        # A plain one answers STARTTLS: that it was offered and refused is not about the mail.
        case 5 if type(reply) is SMTPResponseException:
            return MailDeferred(detail, reply.code)
        # 550, 552, 554 and the like: "permanent". 552 to RCPT once meant "too many recipients, send
        # the rest later" (4.5.3.1.10), but there is only one here.
        case 5:
            return MailRefused(detail, reply.code)
        # Not SMTP, or success where there can be none: the next connection may do better.
        case _:
            return MailDeferred("The SMTP server's answer made no sense")


def _status(reply: SMTPResponseException) -> str:
    enhanced = re.match(r"[245]\.\d{1,3}\.\d{1,3}\b", reply.message)  # RFC 3463
    return f"{reply.code} {enhanced[0]}" if enhanced else str(reply.code)


def one_line(text: str) -> str:
    """Return a server's text as one printable line of at most 500 characters."""
    printable = "".join(character if character.isprintable() else " " for character in text)
    return " ".join(printable.split())[:DETAIL_LENGTH]
