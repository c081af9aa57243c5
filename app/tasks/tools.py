"""The objects that durable tasks work with. Each task gets them as `context.tools`."""

from dataclasses import dataclass
from typing import Any

from afterward import unit_of_work as durable
from afterward.engine import Engine
from afterward.queue import Queue
from app.mail.recipients import Recipients
from app.mail.smtp import Mailer
from app.uploads.pictures import Pictures
from app.uploads.store import Store


@dataclass(frozen=True, slots=True)
class Tools:
    """The objects that main.py makes for the tasks of one process."""

    mailer: Mailer
    mail_from: str
    recipients: Recipients
    uploads: Store
    pictures: Pictures
    engine: Engine
    queue: Queue[Any]


Context = durable.Context[Tools]
