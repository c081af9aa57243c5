"""A form acts once, also if the browser sends it twice: after a double click, or a reload.

The page writes `new_form_key()` into the hidden field `form_key`, and the route commits what the
form asks for by `commit_once`.
"""

import hashlib
import secrets

from afterward.errors import KeyTaken
from afterward.queue import Queue
from afterward.task import Answer
from afterward.unit_of_work import UnitOfWork
from app.api.forms import FormFields
from app.tasks.tools import Tools


def new_form_key() -> str:
    """Return a random text, so that two pages never have the same form."""
    return secrets.token_urlsafe(16)


async def commit_once(
    queue: Queue[Tools],
    unit_of_work: UnitOfWork[Tools],
    form: FormFields,
    client: str,
    location: str,
) -> str:
    """Commit the action of a form, and return the path of the page to show next: `location`.

    If the client has sent the same fields before, with the same key, nothing is written, and the
    path is the `location` of that time. A form without a key is committed each time. Raises
    BacklogFull and QueueUnavailable.
    """
    answer = _answer(form, client, location, queue.now()) if form.get("form_key") else None
    try:
        await queue.commit(unit_of_work.collected(answer))
    except KeyTaken as taken:
        return taken.answer.location
    return location


def _answer(form: FormFields, client: str, location: str, now: float) -> Answer:
    """Return the answer to store. No Idempotency-Key has a space, so none is equal to its key."""
    digest = hashlib.sha256(repr(form.multi_items()).encode()).hexdigest()
    return Answer(f"{client} form {digest}", digest, "", location, now)
