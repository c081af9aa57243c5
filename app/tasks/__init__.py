"""Every kind of background work, one short function each.

A courtesy runs after the response, and is lost if the process dies before it ends. A promise is
committed to the database before the response, and a worker runs it until it succeeds or fails for
good. To add a promise, write an `async def` whose first parameter is a Context, and name it in
`registry`, with a retry policy if it needs its own.

    mail             send_email
    uploads          save_upload, make_thumbnail, remove_upload
    pending_uploads  uploads that have begun and are not committed
    data             save_data
    bulk             retry_tasks, cancel_tasks: many tasks, in slices
    courtesies       write_log and the other functions that BackgroundTasks runs
    workers          the record of each worker, which the pages show
    clean_up         removes old tasks and abandoned uploads, every ten seconds
    log_file         a text file to which courtesies append lines
    tools            the objects that durable tasks work with
"""

from afterward.registry import Registry, TaskKind
from app.settings import Settings
from app.tasks import bulk, mail, uploads
from app.tasks.bulk import cancel_tasks, retry_tasks
from app.tasks.data import save_data
from app.tasks.mail import send_email
from app.tasks.tools import Tools
from app.tasks.uploads import make_thumbnail, remove_upload, save_upload


def registry(settings: Settings) -> Registry[Tools]:
    """Return the registry of all durable tasks. A task without a policy here has the queue's."""
    upload_retry = uploads.retry_policy(settings)
    bulk_retry = bulk.retry_policy(settings)
    return Registry(
        TaskKind(send_email, retry=mail.retry_policy(settings), about="recipient"),
        TaskKind(save_upload, retry=upload_retry, about="upload_id"),
        TaskKind(make_thumbnail, retry=upload_retry, about="upload_id"),
        TaskKind(remove_upload, retry=upload_retry, about="upload_id"),
        TaskKind(save_data, about="user_id"),
        TaskKind(retry_tasks, retry=bulk_retry, urgent=True),
        TaskKind(cancel_tasks, retry=bulk_retry, urgent=True),
    )
