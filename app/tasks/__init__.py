"""Every kind of background work: one short function each.

Courtesies run after the response and are lost when the process dies; promises are on disk before
it and run until they are kept. To add a promise, write an `async def` whose first parameter is a
Context, and name it in `registry`, with a retry policy if it needs one of its own.

    mail       send_email
    uploads    save_upload, make_thumbnail, remove_upload
    pending_uploads  uploads that have begun and are not committed
    data       save_data
    courtesies write_log and the others that BackgroundTasks runs
    clean_up   the regular removal of old tasks and left files
    log_file   a text file that courtesies append lines to
    tools      the objects that durable tasks work with
"""

from afterward.registry import Registry, TaskKind
from app.settings import Settings
from app.tasks import mail, uploads
from app.tasks.data import save_data
from app.tasks.mail import send_email
from app.tasks.tools import Tools
from app.tasks.uploads import make_thumbnail, remove_upload, save_upload


def registry(settings: Settings) -> Registry[Tools]:
    """Name every kind of durable task. Those without a policy of their own have the queue's."""
    of_uploads = uploads.retry_policy(settings)
    return Registry(
        TaskKind(send_email, retry=mail.retry_policy(settings)),
        TaskKind(save_upload, retry=of_uploads),
        TaskKind(make_thumbnail, retry=of_uploads),
        TaskKind(remove_upload, retry=of_uploads),
        save_data,
    )
