"""Every kind of background work: one short function each.

Courtesies run after the response and are lost when the process dies; promises are on disk before
it and run until they are kept. To add a promise, write an `async def` whose first parameter is a
Context, and name it in CATALOGUE.

    mail       send_email
    uploads    save_upload, make_thumbnail, remove_upload
    pending_uploads  uploads that have begun and are not committed
    data       save_data
    courtesies write_log and the others that BackgroundTasks runs
    clean_up   what is done now and then
    tools      what durable tasks work with
"""

from app.queue.durable import Catalogue
from app.tasks.data import save_data
from app.tasks.mail import send_email
from app.tasks.tools import Tools
from app.tasks.uploads import make_thumbnail, remove_upload, save_upload

CATALOGUE: Catalogue[Tools] = Catalogue(
    send_email,
    save_upload,
    make_thumbnail,
    remove_upload,
    save_data,
)
