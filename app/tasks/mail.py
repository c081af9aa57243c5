"""The promise to send a mail."""

from datetime import UTC, datetime

import structlog

from app.mail.message import compose, message_id
from app.mail.replies import MailDeferred, MailRefused
from app.mail.templates import render
from app.queue.errors import PermanentError, TemporaryError
from app.tasks.tools import Context

log = structlog.get_logger(__name__)


async def send_email(context: Context, *, to: str, subject: str, message: str) -> dict[str, str]:
    """Send one notification; the same Message-ID and the same bytes on every attempt."""
    task, tools = context.task, context.tools
    if not tools.recipients.permit(to):  # it may have been queued before that was settled
        raise PermanentError("mail may not be sent to this address")
    body = render("notification", subject=subject, message=message)
    mail = compose(
        sender=tools.mail_from,
        recipient=to,
        subject=subject,
        text=body.text,
        html=body.html,
        message_id=message_id(task.id, tools.mail_from),
        date=datetime.fromtimestamp(task.created_at, UTC),
    )
    try:
        reply = await tools.mailer.send(mail, sender=tools.mail_from, recipient=to)
    except MailDeferred as error:
        log.warning("mail deferred", smtp_code=error.smtp_code)
        raise TemporaryError(error.detail, smtp_code=error.smtp_code) from error
    except MailRefused as error:
        log.warning("mail refused", smtp_code=error.smtp_code)
        raise PermanentError(error.detail, smtp_code=error.smtp_code) from error
    log.info("mail handed over", reply=reply)
    return {"message_id": str(mail["Message-ID"]), "reply": reply}
