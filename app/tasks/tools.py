"""What tasks work with: handed to each durable task as `context.tools`."""

from dataclasses import dataclass

from app.files.pictures import Pictures
from app.files.store import Store
from app.mail.recipients import Recipients
from app.mail.smtp import Mailer
from app.queue import durable
from app.queue.engine import Engine


@dataclass(frozen=True, slots=True)
class Tools:
    """The objects that main.py makes for the tasks."""

    mailer: Mailer
    mail_from: str
    recipients: Recipients
    uploads: Store
    pictures: Pictures
    engine: Engine


Context = durable.Context[Tools]
