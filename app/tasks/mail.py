"""The durable task that sends a mail."""

from datetime import UTC, datetime
from email.message import EmailMessage

import structlog

from afterward.errors import PermanentError, ServiceUnavailable, TemporaryError
from afterward.retry import RetryPolicy
from app.mail.message import compose, message_id
from app.mail.replies import MailDeferred, MailRefused, ServerUnavailable
from app.mail.templates import render
from app.settings import Settings
from app.tasks.tools import Context

log = structlog.get_logger(__name__)


async def send_email(
    context: Context, *, recipient: str, subject: str, message: str
) -> dict[str, str]:
    """Send one notification. Every attempt sends the same bytes with the same Message-ID.

    The arguments come from the database. They may be older than today's rules for addresses and
    texts, or than ALLOWED_RECIPIENTS, so each rule is applied again. Returns the Message-ID and the
    server's reply. Raises PermanentError, TemporaryError or ServiceUnavailable.
    """
    tools = context.tools
    if not tools.recipients.permit(recipient):
        raise PermanentError("mail may not be sent to this address")
    try:
        mail = _compose(context, recipient, subject, message)
    except ValueError as error:
        raise PermanentError(f"the mail cannot be built: {error}") from error
    try:
        reply = await tools.mailer.send(mail, sender=tools.mail_from, recipient=recipient)
    except ServerUnavailable as error:
        raise ServiceUnavailable(error.detail, smtp_code=error.smtp_code) from error
    except MailDeferred as error:
        raise TemporaryError(error.detail, smtp_code=error.smtp_code) from error
    except MailRefused as error:
        raise PermanentError(error.detail, smtp_code=error.smtp_code) from error
    log.info("mail handed over", reply=reply)
    return {"message_id": str(mail["Message-ID"]), "reply": reply}


def retry_policy(settings: Settings) -> RetryPolicy:
    """Return the policy for mails: retry for days (RFC 5321, 4.5.4.1: "at least 4-5 days").

    The first waits last seconds, and later ones up to a quarter of an hour. With
    MAIL_RETRY_SECONDS=0 a mail has one attempt, even if a crash or a stop interrupts it. So the
    recipient gets at most one copy, unless a client retries the failed task.
    """
    patience = settings.mail_retry_seconds
    return RetryPolicy(
        settings.retry_attempts if patience else 1,
        settings.retry_base_seconds,
        settings.retry_max_seconds,
        give_up_after=patience or None,
    )


def _compose(context: Context, recipient: str, subject: str, message: str) -> EmailMessage:
    task, sender = context.task, context.tools.mail_from
    body = render("notification", subject=subject, message=message)
    return compose(
        sender=sender,
        recipient=recipient,
        subject=subject,
        text=body.text,
        html=body.html,
        message_id=message_id(task.id, sender),
        date=datetime.fromtimestamp(task.created_at, UTC),
    )
